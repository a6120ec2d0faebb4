// One run: what became of it, why it waits, its attempts, its log, what went in and came out, and who did what.

import { api, everything, whyNot } from './api.js';
import { h } from './dom.js';
import { absolute, age, clock, duration, now, number, plural, shortId, time } from './format.js';
import { cancel, expectation, holder, rerun } from './actions.js';
import { log } from './log.js';
import { button, copyable, curl, facts, json, labels, link, panel, runLink, took, workflowLink } from './parts.js';
import { badge, isFinal, reason, word } from './status.js';

export function run(id, params) {
  let it = null;
  let attempts = [];
  let events = [];
  let refusals = [];
  let slot = null;
  const printed = log(id, { line: Number(params.get('line')) || undefined, isOver: () => it !== null && isFinal(it) });

  const changed = () => document.dispatchEvent(new Event('singletrack:changed'));
  const acts = () =>
    h('div.buttons', null,
      isFinal(it)
        ? button('Run again', () => rerun(it), { kind: 'primary', why: whyNot('enqueue'), title: 'A new run of the same revision with the same input', name: 'rerun' })
        : button(it.cancel_requested_at ? 'Being cancelled' : 'Cancel', async () => (await cancel(it)) && changed(), { kind: 'danger', disabled: Boolean(it.cancel_requested_at), why: whyNot('enqueue'), name: 'cancel' }));

  const header = () => [
    h('p.crumbs', null, h('a', { href: link('runs') }, 'Runs'), ' / ', h('a', { href: link('runs', { workflow_id: it.workflow_id }) }, it.workflow_id)),
    h('div.head', null, h('h1', null, h('a', { href: workflowLink(it.workflow_id) }, it.workflow_id), ' ', badge(it.status)), acts()),
    h('div.idline', null, copyable(it.id, { what: 'run id', code: false }), labels(it.labels)),
  ];

  return {
    title: 'Run',
    get ages() {
      return it !== null && !isFinal(it);
    },
    wants: (change) => change.run_id === id || (it !== null && !isFinal(it) && change.workflow_id === it.workflow_id),
    async load() {
      const [one, tried, told, refused] = await Promise.all([
        api.run(id),
        api.attempts(id),
        everything((wanted) => api.events(id, wanted), {}, 400),
        api.refusals(id),
      ]);
      [it, attempts, events, refusals] = [one, tried.items, told.items, refused.items];
      // What the list of slots says of it, so that no two screens differ.
      slot = isFinal(it) ? null : (await api.slots({ workflow_id: it.workflow_id })).items[0] ?? null;
      this.title = `${it.workflow_id} ${word(it.status)}`;
    },
    view() {
      printed.draw();
      return [
        header(),
        why(it, slot),
        h('div.columns-2', null,
          h('div', null,
            timeline(it, attempts),
            h('section.panel.logpanel', { key: 'log' }, h('h2', null, 'Log'), printed.element)),
          h('aside', null,
            panel('Run', facts(
              ['Enqueued', time(it.created_at)],
              ['By', it.requested_by],
              ['Due', it.run_at ? time(it.run_at) : null],
              ['Started', it.started_at ? time(it.started_at) : null],
              ['Finished', it.finished_at ? time(it.finished_at) : null],
              ['Took', took(it)],
              ...(slot?.holder?.run_id === it.id ? held(slot) : []),
              ['Attempt', it.attempt ? `${it.attempt} of ${it.max_attempts}` : null],
              ['Exit code', it.exit_code === null ? null : String(it.exit_code)],
              ['Worker', it.worker],
              ['Fence', it.fence ? number(it.fence) : null],
              ['Executor', it.executor_type],
              ['Queue', it.queue],
              ['Priority', it.priority ? String(it.priority) : null],
              ['On conflict', it.on_conflict],
              ['Revision', `${it.definition} ${it.revision}`],
              ['Time limit', it.timeout_seconds ? duration(it.timeout_seconds) : null],
              ['Again of', it.rerun_of ? h('a', { href: runLink(it.rerun_of) }, h('code', null, shortId(it.rerun_of))) : null],
            )),
            it.error ? panel('Error', h('pre.error', { tabindex: 0 }, it.error)) : null,
            it.output === null ? null : panel('Output', json(it.output)),
            it.input === null || it.input === undefined ? null : panel('Input', json(it.input)),
            panel('Events', h('ol.events', null, events.map((event) => h('li', null, h('span.muted', { title: absolute(event.at) }, clock(event.at)), h('div', null, badge(event.to_status), event.reason ? h('span.small', null, ` ${reason(event.reason)}`) : null, h('div.muted.small', null, `by ${event.actor}`)))))),
            refusals.length ? panel('Refused meanwhile', h('ul.refusals', null, refusals.map((one) => h('li', null, h('b', null, number(one.refusals)), ` ${one.refusals === 1 ? 'request' : 'requests'} by ${one.requester ?? 'others'}, last `, time(one.last_at))))) : null,
            h('details', null, h('summary', null, 'As JSON'), curl('GET', `/api/v1/runs/${it.id}`), json(it)))),
      ];
    },
    pressed: (pressed) => pressed === 'f' && printed.toggle(),
    dispose: () => printed.dispose(),
  };
}

/** What there is to say of a run that has the slot. */
const held = ({ holder: { heartbeat_age_seconds: silence, expected_end_at: end, progress }, waiting }) => [
  ['Last heartbeat', typeof silence === 'number' ? `${duration(silence)} ago` : null],
  ['Expected end', end ? expectation(end) : null],
  ['Progress', progress === null ? null : h('code', null, JSON.stringify(progress))],
  ['Behind it', waiting ? plural(waiting, 'run waits', 'runs wait') : null],
];

/** Why it is not running, and what one can do about that. */
function why(it, slot) {
  const said = [];
  const has = slot?.holder ?? null;
  const pause = it.status === 'running' ? null : slot?.pause;
  const because = it.reason ? `: ${reason(it.reason)}.` : '.';
  if (it.cancel_requested_at && !isFinal(it)) said.push(h('p', null, h('b', null, 'It is being cancelled.'), ' Its process was told to stop ', time(it.cancel_requested_at), '.'));
  if (it.status === 'waiting') {
    const line = h('a', { href: link('runs', { workflow_id: it.workflow_id, status: 'waiting,queued,running' }) }, slot?.waiting > 1 ? `${number(slot.waiting)} wait for it` : 'See the line');
    said.push(h('p', null, h('b', null, 'It waits for the slot.'), ` It starts when it is next in line for ${it.workflow_id}. `, line));
    if (has) said.push(holder({ run_id: has.run_id, holder: has }));
  }
  if (it.status === 'scheduled') said.push(h('p', null, h('b', null, 'It is scheduled.'), ' It takes the slot ', time(it.run_at ?? it.available_at), '; then it may be told that it is taken.'));
  if (it.status === 'queued') {
    const cause = has?.run_id === it.id ? has.reason : it.reason;
    if (cause === 'backoff') said.push(h('p', null, h('b', null, `Attempt ${it.attempt} did not succeed.`), ' The next one starts ', time(it.available_at), '; the slot is kept for it.'));
    else if (cause === 'no_worker') said.push(h('p', null, h('b', null, 'No worker takes it.'), ` None that serves queue ${it.queue} and executor ${it.executor_type} was seen. Start one, or `, h('a', { href: link('workers') }, 'see who is there'), '.'));
    else if (cause === 'paused') said.push(h('p', null, h('b', null, 'It has the slot, and is not started: '), pause ? 'its workflow is paused.' : [`queue ${it.queue} is paused. `, h('a', { href: link('system') }, 'See the queues')]));
    else said.push(h('p', null, h('b', null, 'It has the slot, and is about to start.'), age(it.available_at ?? it.created_at) > 5 ? ' All workers that may take it are busy.' : ''));
  }
  if (it.status === 'skipped') said.push(h('p', null, h('b', null, `It never started${because}`), it.blocked_by ? [' The slot was taken by ', h('a', { href: runLink(it.blocked_by) }, h('code', null, shortId(it.blocked_by))), '.'] : null));
  if (it.status === 'stale') said.push(h('p', null, h('b', null, `It is stale${because}`), ' What it was doing may be half done.'));
  if (pause) said.push(h('p', null, h('b', null, `${pause.name} is paused`), ` by ${pause.paused_by}${pause.reason ? `: ${pause.reason}` : ''}. `, h('a', { href: workflowLink(pause.name) }, 'Resume it there')));
  return said.length ? h('div.why', { class: `s-${it.status}` }, said) : null;
}

/** Attempts on one scale, with the time between them shown as what it is: waiting. */
function timeline(it, attempts) {
  if (!attempts.length && isFinal(it)) return null;
  const start = Date.parse(it.run_at ?? it.created_at) <= Date.parse(attempts[0]?.started_at ?? it.created_at) ? Date.parse(it.run_at ?? it.created_at) : Date.parse(it.created_at);
  const end = it.finished_at ? Date.parse(it.finished_at) : now();
  const whole = Math.max(end - start, 1);
  const at = (moment) => `${Math.min(100, Math.max(0, ((moment - start) / whole) * 100))}%`;
  let before = start;
  const rows = attempts.map((attempt) => {
    const from = Date.parse(attempt.started_at);
    const to = attempt.finished_at ? Date.parse(attempt.finished_at) : end;
    const waited = (from - before) / 1000;
    const status = attempt.finished_at ? attempt.status : 'running';
    const bar = h('div.track', null,
      waited > 0 ? h('span.waited', { style: { left: at(before), width: `calc(${at(from)} - ${at(before)})` }, title: `waited ${duration(waited)}` }) : null,
      h('span.span', { class: `s-${status}`, style: attempt.finished_at ? { left: at(from), width: `calc(${at(to)} - ${at(from)})` } : { left: at(from), right: '0' }, title: `${word(status)}: ${duration((to - from) / 1000)}` }));
    before = to;
    return h('div.attempt', { key: String(attempt.fence) },
      h('div.of', null, h('b', null, `#${attempt.attempt}`), ' ', badge(status)),
      bar,
      h('div.took', null, attempt.finished_at ? duration((to - from) / 1000) : time(attempt.started_at, 'since')),
      h('div.muted.small', null, `waited ${duration(waited)}`, attempt.reason ? ` · ${reason(attempt.reason)}` : '', attempt.exit_code === null ? '' : ` · exit code ${attempt.exit_code}`, ` · on ${attempt.worker}`));
  });
  const waiting = !isFinal(it) && it.status !== 'running' ? h('p.muted.small', null, `${word(it.status)} for `, time(new Date(before).toISOString(), 'since')) : null;
  return panel(`Timeline`, h('div.timeline', { 'aria-label': plural(attempts.length, 'attempt') }, rows, waiting));
}
