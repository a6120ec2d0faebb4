// How the service does: what is queued, for how long, how much gets done, and whether all parts are well.

import { Refused, api, base, whyNot } from './api.js';
import { h } from './dom.js';
import { age, bytes, now, number, time } from './format.js';
import { pause, resume } from './actions.js';
import { button, facts, link, panel, pausedBadge, spoken } from './parts.js';
import { FINAL, LIVE, badge } from './status.js';

export function system() {
  let hour = {};
  let queues = [];
  let ready = null;
  let oldest = null;
  let replica = null;
  let hidden = null;
  const changed = () => document.dispatchEvent(new Event('singletrack:changed'));

  const figure = (value, name, href, kind = '') => h('a.figure', { href, class: kind }, h('b', null, value), h('span', null, name));
  const total = (map, names) => names.reduce((sum, name) => sum + (map[name] ?? 0), 0);
  const live = (status) => queues.reduce((sum, queue) => sum + (queue.runs?.[status] ?? 0), 0);

  const row = (queue) => {
    const count = (status) => number(queue.runs?.[status] ?? 0);
    return h('div.tr', { role: 'row', key: queue.name },
      h('div', { role: 'cell' }, h('a.name', { href: link('runs', { queue: queue.name }) }, queue.name), queue.pause ? pausedBadge(`By ${queue.pause.paused_by}${queue.pause.reason ? `: ${queue.pause.reason}` : ''}`) : null),
      LIVE.toReversed().map((status) => h('div.num', { role: 'cell', 'data-label': status }, count(status))),
      h('div.c-acts', { role: 'cell' }, queue.pause
        ? button('Resume', async () => (await resume(queue.name, 'queue'), changed()), { why: whyNot('admin') })
        : button('Pause', async () => (await pause(queue.name, 'queue')) && changed(), { why: whyNot('admin') })));
  };

  const about = () => {
    const words = (fact) => h('span.state', { class: fact ? 'good' : 'bad' }, fact ? 'ready' : 'not ready');
    const { version, database, pools = [] } = replica ?? {};
    const pool = ({ name, max, used, wanted }) => [`Pool ${name}`, `${number(used)} of ${number(max)} in use${wanted ? `, ${number(wanted)} wanted` : ''}`];
    return h('div.columns-2.even', null,
      panel('This replica', facts(['State', words(ready?.ready)], ['Stopping', ready?.draining ? 'yes: it finishes what it has' : null], ['Version', version], ['Address', base], ['API', [h('a', { href: `${base}/docs` }, 'to read'), ', ', h('a', { href: `${base}/openapi.json` }, 'openapi.json')]])),
      panel('Database', facts(['State', ready?.database], ['Schema', ready?.schema], ['Server', database && `PostgreSQL ${database.server_version}`], ['Name', database?.name], ['Size', database && bytes(database.size_bytes)], ...pools.map(pool)), h('p.muted.small', null, 'A check of everything the service promises: ', h('code', null, 'singletrack doctor'), '.')));
  };

  const settings = () => panel('Settings', replica
    ? facts(...Object.entries(replica.settings).map(([name, value]) => [h('code', null, name), value === '' ? h('span.muted', null, 'not set') : h('code', null, value)]))
    : h('p.muted', null, 'Settings, version and database are not for this key: ', spoken(hidden ?? '')));

  return {
    title: 'System',
    ages: true,
    async load() {
      const since = new Date(now() - 3_600_000).toISOString();
      const notForUs = (error) => {
        if (error instanceof Refused && error.status === 403) return { hidden: error.message };
        throw error;
      };
      const [recent, known, state, queued, seen] = await Promise.all([
        api.counts({ since }),
        api.queues(),
        api.ready().catch((error) => error.problem ?? { ready: false }),
        oldestQueued(),
        api.system().catch(notForUs),
      ]);
      [hour, queues, ready, oldest] = [recent, known.items, state, queued];
      [replica, hidden] = seen.hidden ? [null, seen.hidden] : [seen, null];
    },
    view() {
      const bad = total(hour, ['failed', 'timed_out', 'stale']);
      return [
        h('div.head', null, h('h1', null, 'System')),
        h('div.figure-row', null,
          figure(number(live('running')), 'running', link('runs', { status: 'running' })),
          figure(number(live('queued')), 'queued', link('runs', { status: 'queued' })),
          figure(oldest ? time(oldest, 'since') : '–', 'oldest queued', link('runs', { status: 'queued' }), oldest && age(oldest) > 60 ? 'warn' : ''),
          figure(number(live('waiting')), 'waiting for a slot', link('runs', { status: 'waiting' })),
          figure(number(total(hour, [...LIVE, ...FINAL])), `enqueued in the last hour, ${number(total(hour, FINAL))} of them over`, link('runs', { hours: 1 })),
          figure(number(bad), 'of these went wrong', link('runs', { hours: 1, status: 'failed,timed_out,stale' }), bad ? 'warn' : '')),
        panel('Queues', queues.length
          ? h('div.table.queues', { role: 'table', 'aria-label': 'Queues' }, h('div.tr.th', { role: 'row' }, h('div', { role: 'columnheader' }, 'Queue'), LIVE.toReversed().map((status) => h('div.num', { role: 'columnheader' }, badge(status))), h('div', { role: 'columnheader' })), queues.map(row))
          : h('p.muted', null, 'A queue is here when a workflow names one, or a run is in it.')),
        about(),
        h('div.settings', null, settings()),
      ];
    },
  };
}

/** Since when the run is due that has been queued the longest. Queued runs are few, one per workflow at most: the last page has it. */
async function oldestQueued() {
  let cursor;
  let oldest = null;
  for (let pages = 0; pages < 10; pages += 1) {
    const page = await api.runs({ status: 'queued', limit: 200, cursor });
    for (const run of page.items) {
      const due = run.available_at ?? run.created_at;
      if (Date.parse(due) <= now() && (!oldest || due < oldest)) oldest = due;
    }
    cursor = page.next_cursor;
    if (!cursor) break;
  }
  return oldest;
}
