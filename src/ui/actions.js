// What one can do to runs and workflows; with a question before harm, and a conflict explained.

import { Away, Refused, api } from './api.js';
import { h } from './dom.js';
import { absolute, age, duration, shortId, time } from './format.js';
import { badge, reason } from './status.js';
import { button, confirm, dialog, facts, link, runLink, spoken, toast, trouble } from './parts.js';

const go = (hash) => (location.hash = hash);

/** Starts a run and shows it, or explains why it was not started. */
export async function start(workflowId, body = {}) {
  try {
    const run = await api.start(workflowId, body);
    go(runLink(run.id));
    return run;
  } catch (error) {
    if (error instanceof Refused && error.status === 409) return conflict(workflowId, body, error);
    return failed(`${workflowId} was not started`, error, `${workflowId} was started`);
  }
}

/** Says that something was not done; or, where no answer came, that nobody knows whether `wanted` is so. */
function failed(title, error, wanted) {
  const unknown = error instanceof Away && wanted;
  const told = error instanceof Away ? h('p.text', null, 'The server does not answer', unknown ? ', but may have got the request: look before you try again.' : '.') : trouble(error);
  return dialog(unknown ? `It is not known whether ${wanted}` : title, (close) => [told, h('footer', null, button('Close', () => close()))]);
}

/** What a 409 says, and what one can do about it. */
export function conflict(workflowId, body, refused) {
  const { problem } = refused;
  const paused = refused.cause === 'workflow-paused';
  return dialog(paused ? `${workflowId} is paused` : `${workflowId} is already running`, (close, draw) => {
    const again = async (how) => {
      try {
        const run = await api.start(workflowId, { ...body, on_conflict: how });
        close();
        go(runLink(run.id));
      } catch (error) {
        draw(view(error));
      }
    };
    const view = (error) => [
      h('p.text', null, paused
        ? 'While it is paused no run is started. A run may wait for the end of the pause.'
        : 'Each workflow runs at most once at a time, and its slot is taken. Nothing was started. The server answered:'),
      h('p.answer', null, h('code', null, `409 ${refused.cause}`), ' ', spoken(refused.message)),
      holder(problem),
      error ? trouble(error) : null,
      h('footer', null,
        button('Leave it', () => close()),
        problem.run_id ? button('Replace it…', () => (close(), replace(workflowId, body, problem)), { kind: 'danger', name: 'replace' }) : null,
        button('Wait in line', () => again('wait'), { name: 'wait' }),
        problem.run_id ? button('Open that run', () => (close(), go(runLink(problem.run_id))), { kind: 'primary', name: 'open' }) : null,
        paused ? button('Open the workflow', () => (close(), go(link(`workflows/${encodeURIComponent(workflowId)}`))), { kind: 'primary' }) : null),
    ];
    return view();
  });
}

/** Takes the place of whoever has the slot, after a question. */
async function replace(workflowId, body, { holder: held }) {
  const run = await confirm(`Replace the run of ${workflowId}?`, `The run that has the slot${held ? `, requested by ${held.requested_by},` : ''} is cancelled. Yours starts when its process is gone, before all that wait.`, {
    yes: 'Cancel it and run mine',
    doing: () => api.start(workflowId, { ...body, on_conflict: 'replace' }),
  });
  if (run) go(runLink(run.id));
}

/** Who has a slot, as a problem says it. */
export function holder({ run_id: id, holder: held, pause }) {
  if (pause) return facts(['Paused by', pause.paused_by], ['Since', time(pause.paused_at)], ['Why', pause.reason ?? 'no reason given']);
  if (!held) return null;
  return facts(
    ['Held by', h('a', { href: runLink(id) }, h('code', null, shortId(id)))],
    ['Status', [badge(held.status), held.reason ? ` ${reason(held.reason)}` : '']],
    ['Requested by', held.requested_by],
    ['Running for', held.started_at ? time(held.started_at, 'since') : null],
    ['Last heartbeat', typeof held.heartbeat_age_seconds === 'number' ? `${duration(held.heartbeat_age_seconds)} ago` : null],
    ['Expected end', held.expected_end_at ? expectation(held.expected_end_at) : null],
    ['Progress', held.progress === null || held.progress === undefined ? null : h('code', null, JSON.stringify(held.progress))],
  );
}

export const expectation = (at) => h('span', { title: absolute(at) }, age(at) > 0 ? `${duration(Math.round(age(at)))} overdue` : ['usually ', time(at)]);

export function cancel(run) {
  const live = run.status === 'running';
  const text = live
    ? `Its process is told to stop, and killed when it does not. The slot of ${run.workflow_id} is free when it is gone.`
    : `It is ${run.status} and will not start.`;
  return confirm(`Cancel this run of ${run.workflow_id}?`, text, { yes: 'Cancel the run', doing: () => api.cancel(run.id) });
}

export async function rerun(run) {
  try {
    const next = await api.rerun(run.id);
    toast('Started again with the same input. ', h('a', { href: runLink(run.id) }, 'Back to the first'));
    go(runLink(next.id));
  } catch (error) {
    if (error instanceof Refused && error.status === 409 && error.problem.run_id) return conflict(run.workflow_id, { input: run.input ?? undefined }, error);
    failed('It was not started again', error, 'it was started again');
  }
}

export function pause(name, what = 'workflow') {
  const call = what === 'queue' ? api.pauseQueue : api.pause;
  const text = what === 'queue'
    ? 'Nothing of this queue is started until it is resumed. What runs goes on.'
    : `Requests are refused with 409 until it is resumed, except those that wait in line. What runs goes on.${name.includes('@') ? '' : ' Its instances pause with it.'}`;
  return confirm(`Pause ${what} ${name}?`, text, { yes: 'Pause', kind: '', field: 'Why (others will see it)', doing: (said) => call(name, said || null) });
}

export async function resume(name, what = 'workflow') {
  try {
    await (what === 'queue' ? api.resumeQueue(name) : api.resume(name));
    toast(`${name} is resumed.`);
  } catch (error) {
    failed(`${name} is still paused`, error, `${name} is resumed`);
  }
}

/** Cancels or reruns all runs of a filter, after a look at what that comes to. */
export async function bulk(what, filter, described) {
  let preview;
  try {
    preview = await api.bulk(what, { ...filter, dry_run: true });
  } catch (error) {
    return failed(`Can’t ${what} these runs`, error);
  }
  if (!preview.matched) return toast(`There is nothing to ${what} among them.`);
  const verb = what === 'cancel' ? 'Cancel' : 'Run again';
  const text = [
    h('p', null, h('strong', null, String(preview.matched)), ` run${preview.matched === 1 ? '' : 's'}: ${described}.`),
    preview.more ? h('p', null, 'These are the first of more: do it again for the rest.') : null,
    h('p.muted', null, what === 'cancel' ? 'Those that run are told to stop; the others will not start.' : 'Each is asked for anew with its input. Where a slot is taken, its workflow’s policy decides.'),
  ];
  const done = await confirm(`${verb} ${preview.matched === 1 ? 'this run' : 'these runs'}?`, text, {
    yes: `${verb} (${preview.matched})`,
    kind: what === 'cancel' ? 'danger' : '',
    doing: () => api.bulk(what, filter),
  });
  if (done) toast(Object.entries(done.counts).filter(([, count]) => count).map(([name, count]) => `${count} ${name.replaceAll('_', ' ')}`).join(', ') || 'Done.');
}
