// What a workflow's last runs come to, and how that is drawn.

import { api, everything } from './api.js';
import { h, svg } from './dom.js';
import { absolute, duration, secondsBetween } from './format.js';
import { FINAL, LIVE, holdsSlot, word } from './status.js';

/** Results that a row shows. */
export const SHOWN = 20;

const took = (run) => run.seconds ?? (run.started_at && run.finished_at ? secondsBetween(run.started_at, run.finished_at) : null);

export function median(values) {
  if (!values.length) return null;
  const sorted = [...values].sort((a, b) => a - b);
  const middle = sorted.length >> 1;
  return sorted.length % 2 ? sorted[middle] : (sorted[middle - 1] + sorted[middle]) / 2;
}

/** Figures of final runs. What was cancelled or skipped says nothing of how well a workflow does. */
export function figures(runs) {
  const judged = runs.filter((run) => ['succeeded', 'failed', 'timed_out', 'stale'].includes(run.status));
  const good = judged.filter((run) => run.status === 'succeeded');
  return {
    judged: judged.length,
    rate: judged.length ? good.length / judged.length : null,
    typical: median(good.map(took).filter((value) => value !== null)),
  };
}

const newest = (runs) => [...new Map(runs.map((run) => [run.id, run])).values()].sort((a, b) => (a.created_at < b.created_at ? 1 : a.created_at > b.created_at ? -1 : a.id < b.id ? 1 : -1));

const kept = new Map();

/** A slot as the API lists it, as a row. */
function rowOf(slot) {
  const { holder, workflow_id: id } = slot;
  const result = (one) => ({ id: one.run_id, status: one.status, created_at: one.finished_at, finished_at: one.finished_at, seconds: one.seconds });
  return { id, pause: slot.pause, waiting: slot.waiting, scheduled: slot.scheduled, results: slot.results.map(result), whole: true, holder: holder && { ...holder, id: holder.run_id, workflow_id: id } };
}

/** What the home screen knows, by the list of slots; of a server that has none yet, out of other lists. */
export async function readSlots() {
  try {
    const slots = await everything(api.slots);
    return { rows: slots.items.map(rowOf), all: slots.all };
  } catch (error) {
    if (error.status === 404) return composeSlots();
    throw error;
  }
}

/** Every workflow and instance, who has its slot, who waits, and the last results as far as they were read. */
async function composeSlots() {
  const [workflows, live, recent] = await Promise.all([
    everything(api.workflows),
    everything(api.runs, { status: LIVE.join(',') }, 2000),
    api.runs({ status: FINAL.join(','), limit: 200 }),
  ]);
  const rows = new Map();
  const row = (id) => {
    if (!rows.has(id)) rows.set(id, { id, workflow: null, holder: null, waiting: 0, scheduled: 0, results: [] });
    return rows.get(id);
  };
  for (const workflow of workflows.items) row(workflow.id).workflow = workflow;
  for (const run of live.items) {
    const of = row(run.workflow_id);
    if (holdsSlot(run)) of.holder = run;
    else of[run.status] += 1;
  }
  for (const run of recent.items) row(run.workflow_id).results.push(run);
  const definitions = new Map(workflows.items.map((workflow) => [workflow.id, workflow]));
  for (const of of rows.values()) {
    of.pause = of.workflow?.pause ?? definitions.get(of.id.split('@')[0])?.pause ?? null;
    const whole = !recent.next_cursor || of.results.length >= SHOWN;
    const known = kept.get(of.id);
    // What was read of it before goes on with what is new, when nothing is missing between the two.
    const joins = known && (!of.results.length || of.results.some((run) => known.some((other) => other.id === run.id)) || known.length < SHOWN);
    of.results = newest([...of.results, ...(joins ? known : [])]).slice(0, SHOWN);
    of.whole = whole || Boolean(joins);
    if (of.whole) kept.set(of.id, of.results);
  }
  return { rows: [...rows.values()], all: workflows.all && live.all };
}

/** Reads the results of rows that the list of recent runs had too few of; four at a time. */
export async function readResults(rows) {
  const open = rows.filter((row) => !row.whole);
  const next = async () => {
    for (let row = open.pop(); row; row = open.pop()) {
      const page = await api.runs({ workflow_id: row.id, status: FINAL.join(','), limit: SHOWN });
      row.results = page.items;
      row.whole = true;
      kept.set(row.id, page.items);
    }
  };
  await Promise.all([next(), next(), next(), next()]);
}

/** How long the last successes took, oldest first, as a line. */
export function spark(runs) {
  const values = runs.filter((run) => run.status === 'succeeded').map(took).filter((value) => value !== null).reverse();
  if (values.length < 3) return h('span.spark.none');
  const top = Math.max(...values, 0.001);
  const at = values.map((value, index) => `${((index / (values.length - 1)) * 62 + 1).toFixed(1)},${(19 - (value / top) * 16).toFixed(1)}`);
  const text = `The last ${values.length} successes: ${duration(Math.min(...values))} to ${duration(top)}`;
  return svg('svg.spark', { viewBox: '0 0 64 20', role: 'img', 'aria-label': text }, svg('title', null, text), svg('polyline', { points: at.join(' ') }));
}

/** The last runs as columns: how long each took, and how it ended. */
export function chart(runs, runLink) {
  const shown = runs.filter((run) => took(run) !== null).slice(0, 60).reverse();
  if (!shown.length) return h('p.muted', null, 'No run has finished yet.');
  const top = Math.max(...shown.map(took), 0.001);
  const { typical } = figures(runs);
  const line = typical === null ? null : h('div.typical', { style: { bottom: `${(typical / top) * 100}%` } }, h('span', null, `typical ${duration(typical)}`));
  const columns = shown.map((run) => {
    const title = `${word(run.status)} in ${duration(took(run))}, ${absolute(run.finished_at)}`;
    return h('a.column', { href: runLink(run.id), class: `s-${run.status}`, title, 'aria-label': title, style: { height: `${Math.max(2, (took(run) / top) * 100)}%` } });
  });
  return h('div.chart', null, h('span.top-value', null, duration(top)), h('div.columns', null, columns, line));
}
