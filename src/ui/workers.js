// Who does the work, and what each has in hand.

import { Refused, api, everything } from './api.js';
import { h } from './dom.js';
import { number, plural, shortId, time } from './format.js';
import { curl, empty, runLink, workflowLink } from './parts.js';
import { badge } from './status.js';

export function workers() {
  let running = [];
  let seen = null;
  return {
    title: 'Workers',
    async load() {
      const older = (error) => {
        if (error instanceof Refused && error.status === 404) return null;
        throw error;
      };
      const [page, known] = await Promise.all([everything(api.runs, { status: 'running' }), everything(api.workers).catch(older)]);
      [running, seen] = [page.items, known?.items ?? null];
    },
    view() {
      const held = Map.groupBy ? Map.groupBy(running, (run) => run.worker) : group(running);
      const names = [...new Set([...(seen ?? []).map((worker) => worker.name), ...held.keys()])].sort();
      return [
        h('div.head', null, h('h1', null, 'Workers'), h('p.sub', null, `${plural(names.length, 'worker')}${seen ? '' : ' at work'}, ${plural(running.length, 'run')} in hand`)),
        names.length ? h('div.cards', null, names.map((name) => card(name, (seen ?? []).find((worker) => worker.name === name), held.get(name) ?? []))) : nobody(seen),
      ];
    },
  };
}

function group(runs) {
  const groups = new Map();
  for (const run of runs) groups.set(run.worker, [...(groups.get(run.worker) ?? []), run]);
  return groups;
}

function card(name, worker, runs) {
  const list = (values, all) => (values ? values.join(', ') : all);
  const [host] = name.split(':');
  return h('section.panel.worker', { key: name },
    h('header', null, h('h2', { title: name }, host), h('span.count', null, number(runs.length))),
    h('p.muted.small.mono', null, name),
    worker ? h('p.small', null, `${list(worker.executor_types, 'all executors')} · ${list(worker.queues, 'all queues')}${worker.workflows ? ` · ${worker.workflows.join(', ')}` : ''}`) : null,
    worker ? h('p.small.muted', null, worker.version ? `version ${worker.version} · ` : '', 'seen ', time(worker.seen_at)) : null,
    runs.length ? h('ul.recent', null, runs.slice(0, 50).map((run) => h('li', { key: run.id, 'data-row': true }, badge(run.status), h('a.name', { href: workflowLink(run.workflow_id) }, run.workflow_id), h('a', { href: runLink(run.id), 'data-open': true }, h('code', null, shortId(run.id))), h('span.took', null, time(run.started_at, 'since'))))) : h('p.muted', null, 'Nothing in hand.'),
    runs.length > 50 ? h('p.muted', null, `and ${number(runs.length - 50)} more`) : null);
}

function nobody(seen) {
  return empty(seen ? 'No worker was seen' : 'Nobody is at work',
    h('p', null, seen ? 'Queued runs wait until a worker comes.' : 'Workers are shown here with the runs that they have in hand. No run is running.'),
    h('p', null, 'A replica works by itself; a worker in any language claims runs of the executor ', h('code', null, 'pull'), ':'),
    curl('POST', '/api/v1/claims', { worker: 'me', max: 1, wait_seconds: 30 }));
}
