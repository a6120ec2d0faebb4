// All runs: filters in the address, live, and what one can do to all of them.

import { api, whyNot } from './api.js';
import { h } from './dom.js';
import { number, shortId, time } from './format.js';
import { bulk } from './actions.js';
import { button, curl, empty, labels, link, runLink, took, workflowLink } from './parts.js';
import { FINAL, LIVE, STATUSES, badge, isFinal, reason, shape, word } from './status.js';

const PAGE = 50;
const FILTERS = ['workflow_id', 'definition', 'queue', 'label', 'since', 'until'];
const SPANS = { '': 'Any time', 1: 'Last hour', 24: 'Last day', 168: 'Last week' };

export function runs(params) {
  const filter = Object.fromEntries(FILTERS.filter((name) => params.get(name)).map((name) => [name, params.get(name)]));
  const hours = Number(params.get('hours')) || null;
  const status = params.get('status') ?? '';
  const cursor = params.get('cursor') ?? '';
  let page = { items: [] };
  let counts = {};
  let queues = [];
  let example = null;

  const wanted = () => ({ ...filter, ...(hours ? { since: new Date(Date.now() - hours * 3_600_000).toISOString() } : {}) });
  const go = (change) => (location.hash = link('runs', { ...filter, hours, status, ...change }));

  const tabs = () => {
    const total = Object.values(counts).reduce((sum, count) => sum + count, 0);
    const tab = (name, title, count) => h('a.tab', { href: link('runs', { ...filter, hours, status: name }), 'aria-current': status === name ? 'true' : null, class: count ? '' : 'zero' }, name && !name.includes(',') ? h('span.badge', { class: `s-${name}` }, shape(name)) : null, title, h('span.count', null, number(count)));
    return h('nav.tabs', { 'aria-label': 'Statuses' }, tab('', 'All', total), STATUSES.map((name) => tab(name, word(name), counts[name] ?? 0)));
  };

  const field = (name, label, type = 'search') =>
    h('label.field.inline', null, h('span', null, label), h('input', { type, name, value: filter[name] ?? '', placeholder: 'any', autocomplete: 'off', spellcheck: 'false', onchange: (event) => go({ [name]: event.target.value.trim() }) }));

  const filters = () =>
    h('form.filters', { onsubmit: (event) => event.preventDefault() },
      field('workflow_id', 'Workflow'),
      field('definition', 'Definition'),
      h('label.field.inline', null, h('span', null, 'Queue'), h('select', { name: 'queue', value: filter.queue ?? '', onchange: (event) => go({ queue: event.target.value }) }, h('option', { value: '' }, 'any'), [...new Set([...queues, ...(filter.queue ? [filter.queue] : [])])].map((name) => h('option', { value: name }, name)))),
      field('label', 'Label'),
      h('label.field.inline', null, h('span', null, 'Enqueued'), h('select', { name: 'hours', value: hours ? String(hours) : '', onchange: (event) => go({ hours: event.target.value, since: '', until: '' }) }, Object.entries(SPANS).map(([value, text]) => h('option', { value }, text)))),
      Object.keys(filter).length || hours ? h('a.clear', { href: link('runs', { status }) }, 'Clear') : null);

  const forBulk = (possible) => {
    const { label, ...rest } = wanted();
    const [name, ...value] = (label ?? '').split('=');
    const statuses = (status ? status.split(',') : possible).filter((one) => possible.includes(one));
    return { ...rest, status: statuses, ...(label ? { labels: { [name]: value.join('=') } } : {}) };
  };
  const described = (possible) => {
    const what = [status ? status.split(',').map(word).join(', ') : possible === LIVE ? 'all that are not over' : 'all that are over', ...Object.entries(filter).map(([name, value]) => `${name.replace('_id', '')} ${value}`), hours ? SPANS[hours].toLowerCase() : ''];
    return what.filter(Boolean).join(', ');
  };
  const acts = () => {
    const many = (possible) => possible.reduce((sum, one) => sum + (!status || status.split(',').includes(one) ? (counts[one] ?? 0) : 0), 0);
    const [over, open] = [many(FINAL), many(LIVE)];
    const act = async (what, possible) => {
      await bulk(what, forBulk(possible), described(possible));
      document.dispatchEvent(new Event('singletrack:changed'));
    };
    return h('div.buttons', null,
      over && (status || Object.keys(filter).length || hours) ? button(`Run ${number(over)} again…`, () => act('rerun', FINAL), { why: whyNot('enqueue'), name: 'rerun-all' }) : null,
      open ? button(`Cancel ${number(open)}…`, () => act('cancel', LIVE), { kind: 'danger', why: whyNot('enqueue'), name: 'cancel-all' }) : null);
  };

  const row = (run) =>
    h('div.tr', { role: 'row', key: run.id, 'data-row': true },
      h('div.c-status', { role: 'cell' }, badge(run.status), run.cancel_requested_at && !isFinal(run) ? h('span.muted.small', null, 'being cancelled') : run.reason ? h('span.muted.small', { title: run.reason }, reason(run.reason)) : null),
      h('div.c-name', { role: 'cell' }, h('a.name', { href: workflowLink(run.workflow_id) }, run.workflow_id), labels(run.labels)),
      h('div.c-run', { role: 'cell' }, h('a', { href: runLink(run.id), 'data-open': true, title: run.id }, h('code', null, shortId(run.id)))),
      h('div.c-when', { role: 'cell' }, time(run.created_at)),
      h('div.c-took', { role: 'cell' }, took(run) ?? h('span.muted', null, '–')),
      h('div.c-attempt', { role: 'cell' }, run.attempt === 0 ? h('span.muted', null, '–') : run.max_attempts > 1 ? `${run.attempt} of ${run.max_attempts}` : h('span.muted', null, '1')),
      h('div.c-by', { role: 'cell', title: run.requested_by }, run.requested_by));

  return {
    title: 'Runs',
    // A page that was turned to keeps its place: what is new is on the first one.
    wants: (change) => !cursor && (!filter.workflow_id || change.workflow_id === filter.workflow_id) && (!filter.definition || change.definition === filter.definition),
    async load() {
      [page, counts, queues] = await Promise.all([
        api.runs({ ...wanted(), status, cursor, limit: PAGE }),
        api.counts(wanted()),
        queues.length ? queues : api.queues().then(({ items }) => items.map((queue) => queue.name)),
      ]);
      if (!page.items.length) example = (await api.workflows({ limit: 1 })).items[0]?.id ?? null;
    },
    view() {
      const any = Object.values(counts).some(Boolean);
      const narrow = status || Object.keys(filter).length || hours;
      return [
        h('div.head', null, h('h1', null, 'Runs'), acts()),
        filters(),
        tabs(),
        page.items.length
          ? h('div.table.runs', { role: 'table', 'aria-label': 'Runs' }, h('div.tr.th', { role: 'row' }, ['Status', 'Workflow', 'Run', 'Enqueued', 'Took', 'Attempt', 'By'].map((name) => h('div', { role: 'columnheader' }, name))), page.items.map(row))
          : any || narrow ? h('p.none', null, 'No run is like that. ', h('a', { href: link('runs') }, 'Show all')) : teach(example),
        cursor || page.next_cursor ? h('p.more', null, cursor ? h('a.button', { href: link('runs', { ...filter, hours, status }) }, 'Newest') : null, page.next_cursor ? h('a.button', { href: link('runs', { ...filter, hours, status, cursor: page.next_cursor }), 'data-name': 'older' }, 'Older') : null) : null,
      ];
    },
  };
}

function teach(workflow) {
  if (!workflow) return empty('No run yet', h('p', null, 'Nor is there a workflow to run. ', h('a', { href: link('') }, 'How to define one')));
  return empty('No run yet', h('p', null, 'A run is asked for by its workflow’s name:'), curl('POST', `/api/v1/workflows/${encodeURIComponent(workflow)}/runs`, {}));
}
