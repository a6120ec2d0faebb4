// What a workflow's last runs come to, and how that is drawn.

import { api, everything } from './api.js';
import { h, svg } from './dom.js';
import { absolute, duration, secondsBetween } from './format.js';
import { word } from './status.js';

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

/** A slot as the API lists it, as a row. */
function rowOf(slot) {
  const { holder, workflow_id: id } = slot;
  const result = (one) => ({ id: one.run_id, status: one.status, finished_at: one.finished_at, seconds: one.seconds });
  return { id, pause: slot.pause, waiting: slot.waiting, scheduled: slot.scheduled, results: slot.results.map(result), holder: holder && { ...holder, id: holder.run_id, workflow_id: id } };
}

/** Every workflow and instance, who has its slot, who waits, and the last results; `all` says whether that is all of them. */
export async function readSlots() {
  const slots = await everything(api.slots);
  return { rows: slots.items.map(rowOf), all: slots.all };
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
