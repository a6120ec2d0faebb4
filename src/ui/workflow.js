// One workflow: what it is, when it runs by itself, how it has done, and running it now.

import { Refused, api, whyNot } from './api.js';
import { h } from './dom.js';
import { absoluteIn, age, duration, number, percent, secondsBetween, shortId, time } from './format.js';
import { chart, figures } from './history.js';
import { cancel, pause, resume, start } from './actions.js';
import { button, curl, dialog, empty, facts, freeBadge, json, labels, link, meter, panel, pausedBadge, runLink } from './parts.js';
import { FINAL, LIVE, badge, holdsSlot } from './status.js';

export function workflow(id) {
  let it = null;
  let revisions = [];
  let next = null;
  let live = [];
  let past = [];
  const named = id.split('@')[0];
  let pausedAs = null;
  const changed = () => document.dispatchEvent(new Event('singletrack:changed'));

  const acts = () =>
    h('div.buttons', null,
      pausedAs
        ? button('Resume', async () => (await resume(pausedAs.name), changed()), { why: whyNot('admin'), name: 'resume' })
        : button('Pause', async () => (await pause(id)) && changed(), { why: whyNot('admin'), name: 'pause' }),
      button('Run with input…', () => withInput(id), { why: whyNot('enqueue'), name: 'run-input' }),
      button('Run now', () => start(id), { kind: 'primary', why: whyNot('enqueue'), name: 'run' }));

  const slot = () => {
    const holder = live.find(holdsSlot);
    const waiting = live.filter((run) => run.status === 'waiting').length;
    const { typical } = figures(past);
    if (!holder) return panel('Slot', h('p', null, freeBadge(), waiting ? ` ${number(waiting)} waiting` : ''));
    const since = holder.started_at ?? holder.created_at;
    return panel('Slot',
      h('p', null, badge(holder.status), ' ', h('a', { href: runLink(holder.id) }, h('code', null, shortId(holder.id))), ' for ', time(since, 'since')),
      typical && holder.started_at ? meter(age(since) / typical, `usually takes ${duration(typical)}`) : null,
      h('p.muted.small', null, `requested by ${holder.requested_by}`, holder.worker ? ` · on ${holder.worker}` : ''),
      waiting ? h('p', null, h('a', { href: link('runs', { workflow_id: id, status: 'waiting' }) }, `${number(waiting)} waiting`)) : null,
      h('div.buttons', null, button('Cancel the run', async () => (await cancel(holder)) && changed(), { kind: 'danger', why: whyNot('enqueue') })));
  };

  const schedule = () => {
    const { schedule: set } = it;
    // That of a definition is not its instances'.
    if (!set || it.id !== id) return null;
    return panel('Schedule', facts(['Cron', h('code', null, set.cron)], ['Time zone', set.time_zone], ['When missed', set.missed === 'skip' ? 'left out' : 'run once']),
      next?.next?.length ? h('ol.ticks', null, next.next.map((at) => h('li', null, h('span', null, absoluteIn(set.time_zone, at)), ' ', h('span.muted', null, time(at))))) : null,
      next?.paused ? h('p.muted', null, 'It is paused: these are skipped.') : null);
  };

  const definition = () => {
    const { executor } = it;
    const { argv, url } = executor;
    return panel('Definition', facts(
      ['Executor', executor.type],
      ['Command', argv ? h('code.argv', null, argv.map((arg) => (/^[\w./:=@-]+$/.test(arg) ? arg : `'${arg.replaceAll("'", "'\\''")}'`)).join(' ')) : null],
      ['URL', url],
      ['On conflict', it.on_conflict],
      ['Time limit', it.timeout_seconds ? duration(it.timeout_seconds) : 'the service’s'],
      ['Attempts', it.max_attempts > 1 ? `${it.max_attempts}, on ${it.retry_on.join(', ').replace('_', ' ')}` : '1'],
      ['Queue', it.queue],
      ['Priority', String(it.priority)],
      ['Labels', labels(it.labels)],
      ['Revision', [String(it.revision), ', ', time(it.created_at), ` by ${it.created_by}`]],
    ), h('details', null, h('summary', null, 'As JSON'), json(it)), revisions.length > 1 ? h('details', null, h('summary', null, `${number(revisions.length)} revisions`), h('ol.revisions', null, revisions.map((one) => h('li', null, h('b', null, `${one.revision}`), ' ', time(one.created_at), ` by ${one.created_by}`)))) : null);
  };

  return {
    title: id,
    wants: (change) => change.workflow_id === id,
    async load() {
      const missing = (error) => {
        if (error instanceof Refused && error.status === 404) return null;
        throw error;
      };
      const [own, of, slot, all, current, over] = await Promise.all([
        api.workflow(id).catch(missing),
        named === id ? null : api.workflow(named).catch(missing),
        api.slots({ workflow_id: id }),
        api.revisions(named).catch(missing),
        api.runs({ workflow_id: id, status: LIVE.join(','), limit: 200 }),
        api.runs({ workflow_id: id, status: FINAL.join(','), limit: 100 }),
      ]);
      // An instance uses the definition, unless it has one itself.
      [it, revisions, live, past] = [own ?? of, all?.items ?? [], current.items, over.items];
      pausedAs = slot.items[0]?.pause ?? it?.pause ?? null;
      next = own?.schedule ? await api.next(id).catch(() => null) : null;
    },
    view() {
      const { rate, judged, typical } = figures(past);
      if (!it && !revisions.length && !past.length) return unknown(id);
      return [
        h('p.crumbs', null, h('a', { href: link('') }, 'Slots'), ' / ', named === id ? 'workflow' : ['instance of ', h('a', { href: link(`workflows/${encodeURIComponent(named)}`) }, named)]),
        h('div.head', null, h('h1', null, id, ' ', pausedAs ? pausedBadge() : null), it ? acts() : null),
        it ? null : h('p.why', null, h('b', null, 'It is not defined.'), ' It was deleted, or this key may not see what defines it; its history stays.'),
        pausedAs ? h('div.why', null, h('p', null, h('b', null, `${pausedAs.name === id ? 'Paused' : `${pausedAs.name} is paused`} by ${pausedAs.paused_by}`), ' ', time(pausedAs.paused_at), pausedAs.reason ? `: ${pausedAs.reason}` : ', without a reason.')) : null,
        h('div.columns-2', null,
          h('div', null,
            past.length || live.length ? null : it ? first(id) : null,
            !past.length ? null : panel(past.length < 2 ? 'Last run' : `Last ${past.length === 100 ? '60' : number(past.length)} runs`, h('div.figures', null, h('div', null, h('b', null, rate === null ? '–' : percent(rate)), h('span', null, judged ? `succeeded, of ${judged}` : 'succeeded')), h('div', null, h('b', null, duration(typical)), h('span', null, 'typical')), h('div', null, h('b', null, past[0] ? time(past[0].finished_at) : '–'), h('span', null, 'last end'))), chart(past, runLink)),
            past.length || live.length ? panel('Runs', recent([...live, ...past].slice(0, 12)), h('p', null, h('a', { href: link('runs', { workflow_id: id }) }, 'All its runs'))) : null,
            it && (past.length || live.length) ? panel('From a shell', curl('POST', `/api/v1/workflows/${encodeURIComponent(id)}/runs`, {})) : null),
          it ? h('aside', null, slot(), schedule(), definition()) : null),
      ];
    },
  };
}

/** What to do with a workflow that never ran. */
function first(id) {
  return panel('No run yet',
    h('p', null, button('Run now', () => start(id), { why: whyNot('enqueue'), name: 'first' }), ' or from a shell:'),
    curl('POST', `/api/v1/workflows/${encodeURIComponent(id)}/runs`, {}),
    h('p.muted', null, 'It is answered 202 with the run; and while that runs, 409 with its id.'));
}

function unknown(id) {
  return [h('h1', null, id), empty('There is no such workflow',
    h('p', null, 'To define it, say what to execute:'),
    curl('PUT', `/api/v1/workflows/${encodeURIComponent(id)}`, { executor: { type: 'command', argv: ['echo', 'hello'] } }))];
}

function recent(runs) {
  return h('ul.recent', null, runs.map((run) => h('li', { key: run.id, 'data-row': true }, badge(run.status), h('a', { href: runLink(run.id), 'data-open': true }, h('code', null, shortId(run.id))), h('span.muted', null, time(run.created_at)), h('span.took', null, run.started_at && run.finished_at ? duration(secondsBetween(run.started_at, run.finished_at)) : ''))));
}

function withInput(id) {
  return dialog(`Run ${id}`, (close, draw) => {
    let text = '{}';
    const run = () => {
      let input;
      try {
        input = JSON.parse(text);
      } catch (error) {
        return draw(view(`That is not JSON: ${error.message}`));
      }
      close();
      start(id, { input });
    };
    const view = (wrong) => [
      h('label.field', null, 'Input, as JSON', h('textarea', { name: 'input', rows: 8, spellcheck: 'false', value: text, oninput: (event) => (text = event.target.value) })),
      wrong ? h('p.trouble', { role: 'alert' }, wrong) : null,
      h('footer', null, button('Close', () => close()), button('Run', run, { kind: 'primary' })),
    ];
    return view();
  });
}
