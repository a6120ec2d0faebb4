// Who does the work, and what each has in hand.

import { api, everything } from './api.js';
import { h } from './dom.js';
import { number, plural, shortId, time } from './format.js';
import { curl, empty, runLink, workflowLink } from './parts.js';

export function workers() {
  let running = [];
  let seen = [];
  return {
    title: 'Workers',
    ages: true,
    async load() {
      const [runs, known] = await Promise.all([everything(api.runs, { status: 'running' }), everything(api.workers)]);
      [running, seen] = [runs.items, known.items];
    },
    view() {
      const held = Map.groupBy(running, (run) => run.worker);
      const known = new Map(seen.map((worker) => [worker.name, worker]));
      const names = [...new Set([...known.keys(), ...held.keys()])].sort();
      return [
        h('div.head', null, h('h1', null, 'Workers'), h('p.sub', null, `${plural(names.length, 'worker')}, ${plural(running.length, 'run')} in hand`)),
        names.length ? h('div.cards', null, names.map((name) => card(name, known.get(name), held.get(name) ?? []))) : nobody(),
      ];
    },
  };
}

function card(name, worker, runs) {
  const list = (values, all) => (values ? values.join(', ') : all);
  const [host] = name.split(':');
  return h('section.panel.worker', { key: name },
    h('header', null, h('h2', { title: name }, host), h('span.count', null, `${number(runs.length)} in hand`)),
    h('p.muted.small.mono', null, name),
    worker ? h('p.small', null, `${list(worker.executor_types, 'all executors')} · ${list(worker.queues, 'all queues')}${worker.workflows ? ` · ${worker.workflows.join(', ')}` : ''}`) : null,
    worker ? h('p.small.muted', null, worker.version ? `version ${worker.version} · ` : '', 'seen ', time(worker.seen_at)) : null,
    runs.length ? h('ul.recent', null, runs.slice(0, 50).map((run) => h('li', { key: run.id, 'data-row': true }, h('a.name', { href: workflowLink(run.workflow_id) }, run.workflow_id), h('a', { href: runLink(run.id), 'data-open': true }, h('code', null, shortId(run.id))), h('span.took', null, time(run.started_at, 'since'))))) : null,
    runs.length > 50 ? h('p.muted', null, `and ${number(runs.length - 50)} more`) : null);
}

function nobody() {
  return empty('No worker was seen',
    h('p', null, 'Queued runs wait until a worker comes.'),
    h('p', null, 'A replica works by itself; a worker in any language claims runs of the executor ', h('code', null, 'pull'), ':'),
    curl('POST', '/api/v1/claims', { worker: 'me', max: 1, wait_seconds: 30 }));
}
