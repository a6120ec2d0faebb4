// Home: one row per workflow. Who has the slot, since when, who waits, and how the last runs went.

import { may, whyNot } from './api.js';
import { h } from './dom.js';
import { age, duration, number, percent, plural, shortId, time } from './format.js';
import { figures, readSlots, spark } from './history.js';
import { cancel, holder, start } from './actions.js';
import { button, curl, empty, freeBadge, icon, link, meter, pausedBadge, runLink, strip, workflowLink } from './parts.js';
import { badge, reason, shape } from './status.js';

/** Rows that are drawn at once. */
const PAGE = 60;

const SHOW = {
  all: ['All', () => true],
  taken: ['Taken', (row) => row.holder],
  waiting: ['Somebody waits', (row) => row.waiting],
  failing: ['Failing', (row) => row.results[0] && ['failed', 'timed_out', 'stale'].includes(row.results[0].status)],
  paused: ['Paused', (row) => row.pause],
};

export function slots(params, redraw) {
  let known = { rows: [], all: true };
  let most = PAGE;
  const open = new Set();
  let show = params.get('show') in SHOW ? params.get('show') : 'all';
  let text = params.get('q') ?? '';

  const remember = () => history.replaceState(null, '', link('', { show: show === 'all' ? null : show, q: text }));
  const shown = () => {
    const rows = known.rows.filter((row) => SHOW[show][1](row) && row.id.toLowerCase().includes(text.toLowerCase()));
    const rank = (row) => (row.holder ? 0 : row.waiting ? 1 : 2);
    return rows.sort((a, b) => rank(a) - rank(b) || (a.id < b.id ? -1 : 1));
  };
  const choose = (change) => {
    change();
    remember();
    redraw();
  };

  const tools = () =>
    h('div.toolbar', null,
      h('div.tabs', { role: 'group', 'aria-label': 'Which workflows' }, Object.entries(SHOW).map(([name, [title, test]]) =>
        h('button.tab', { type: 'button', 'aria-pressed': String(show === name), onclick: () => choose(() => (show = name)) }, title, h('span.count', null, number(known.rows.filter(test).length))))),
      h('label.search', null, icon('search'), h('input', { type: 'search', placeholder: 'Filter workflows', 'aria-label': 'Filter workflows', value: text, oninput: (event) => choose(() => (text = event.target.value)) })));

  return {
    title: 'Slots',
    ages: true,
    async load() {
      known = await readSlots();
    },
    view() {
      if (!known.rows.length) return [h('h1', null, 'Slots'), teach()];
      const rows = shown();
      const held = known.rows.filter((row) => row.holder?.status === 'running').length;
      return [
        h('div.head', null, h('h1', null, 'Slots'), h('p.sub', null, `${plural(known.rows.length, 'workflow')}, ${number(held)} running${known.all ? '' : '; the first thousand are shown'}`)),
        tools(),
        h('div.table.slots', { role: 'table', 'aria-label': 'Slots' },
          h('div.tr.th', { role: 'row' }, ['Workflow', 'Slot', 'Waiting', 'Last 20', 'Success', 'Typical', ''].map((name) => h('div', { role: 'columnheader' }, name))),
          rows.slice(0, most).map((row) => [slotRow(row, open, redraw), open.has(row.id) && row.holder ? answer(row) : null])),
        rows.length ? null : h('p.none', null, 'No workflow is like that. ', h('a', { href: link(''), onclick: () => choose(() => ([show, text] = ['all', ''])) }, 'Show all')),
        rows.length > most ? h('p.more', null, button(`Show more (${number(rows.length - most)})`, () => choose(() => (most += 200)))) : null,
      ];
    },
  };
}

function slotRow(row, open, redraw) {
  const { rate, judged, typical } = figures(row.results);
  const cell = (name, ...children) => h('div', { role: 'cell', class: `c-${name}` }, children);
  const isOpen = open.has(row.id);
  const toggle = () => {
    if (!open.delete(row.id)) open.add(row.id);
    redraw();
  };
  return h('div.tr', { role: 'row', key: row.id, 'data-row': true, class: row.holder ? 'held' : '' },
    cell('name', h('a.name', { href: workflowLink(row.id), 'data-open': true }, row.id), row.pause ? pausedBadge(`Paused by ${row.pause.paused_by}${row.pause.reason ? `: ${row.pause.reason}` : ''}`) : null),
    cell('slot', slot(row, typical)),
    cell('waiting', row.waiting ? h('a', { href: link('runs', { workflow_id: row.id, status: 'waiting' }), title: plural(row.waiting, 'run waits', 'runs wait') }, number(row.waiting)) : h('span.muted', null, '0'), row.scheduled ? h('span.muted.later', { title: plural(row.scheduled, 'run is', 'runs are') + ' scheduled' }, shape('scheduled'), number(row.scheduled)) : null),
    cell('strip', strip(row.results)),
    cell('rate', rate === null ? h('span.muted', null, '–') : h('span', { title: `of the last ${judged} that ended by themselves`, class: rate < 0.5 ? 'bad' : '' }, percent(rate))),
    cell('typical', spark(row.results), h('span', null, duration(typical))),
    cell('acts', row.holder
      ? button(['Why 409', icon('chevron')], toggle, { kind: `quiet disclose${isOpen ? ' open' : ''}`, title: 'Who has it, and what a request would be told now', label: `Why 409: who has ${row.id}, and what a request would be told now`, name: 'explain' })
      : button('Run now', () => start(row.id), { why: whyNot('enqueue'), label: `Run now: ${row.id}`, name: 'run' })));
}

function slot(row, typical) {
  const run = row.holder;
  if (!run) return freeBadge();
  const running = run.status === 'running';
  const since = running ? run.started_at : run.created_at;
  const share = typical && running ? age(since) / typical : null;
  return h('div.slot', null,
    h('div', null, badge(run.status), ' ', h('a', { href: runLink(run.id) }, time(since, 'since'))),
    lease(run),
    share === null ? (run.reason ? h('span.muted.small', null, reason(run.reason)) : null) : meter(share, share > 1 ? `longer than usual, which is ${duration(typical)}` : `usually takes ${duration(typical)}`, share > 1.5 ? 'over' : ''));
}

/** How fresh the lease is: full when its worker has just said that it lives. */
function lease({ heartbeat_age_seconds: silence, heartbeat_timeout_seconds: patience }) {
  if (typeof silence !== 'number') return null;
  return meter(1 - silence / patience, `last heartbeat ${duration(silence)} ago; stale after ${duration(patience)}`, silence > patience / 2 ? 'lease over' : 'lease');
}

/** What a request would be told now, and what one can do about it. */
function answer(row) {
  const run = row.holder;
  return h('div.would', { key: `${row.id}?`, role: 'row' }, h('div', { role: 'cell' },
    h('p', null, 'A request now is answered ', h('code', null, '409 slot-taken'), ' with ', h('code', null, `"run_id": "${run.id}"`), ', unless it asks to wait.'),
    holder({ run_id: run.id, holder: run }),
    h('div.buttons', null,
      h('a.button.primary', { href: runLink(run.id) }, `Open ${shortId(run.id)}`),
      button('Wait in line', () => start(row.id, { on_conflict: 'wait' }), { why: whyNot('enqueue'), name: 'wait' }),
      button('Ask anyway', () => start(row.id, { on_conflict: 'reject' }), { why: whyNot('enqueue'), title: 'Sends the request, and shows what it is told', name: 'ask' }),
      may('enqueue') ? button('Cancel the run', async () => (await cancel(run)) && document.dispatchEvent(new Event('singletrack:changed')), { kind: 'danger', name: 'cancel' }) : null)));
}

function teach() {
  const body = { executor: { type: 'command', argv: ['sh', '-c', 'for i in 1 2 3; do echo step $i; sleep 2; done'] } };
  return empty('No workflow yet',
    h('p', null, 'A workflow is a name and what to execute. Each runs at most once at a time: its slot is a row here.'),
    h('ol', null,
      h('li', null, h('p', null, 'Define one:'), curl('PUT', '/api/v1/workflows/hello', body)),
      h('li', null, h('p', null, 'Run it: 202, and the run. Again while it runs: 409, and the id of the run that has the slot.'), curl('POST', '/api/v1/workflows/hello/runs', {}))));
}
