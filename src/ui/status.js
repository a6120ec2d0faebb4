// Statuses: each has a shape and a word besides its colour.

import { h, svg } from './dom.js';

export const LIVE = ['scheduled', 'waiting', 'queued', 'running'];
export const FINAL = ['succeeded', 'failed', 'cancelled', 'timed_out', 'stale', 'skipped'];
export const STATUSES = ['running', 'queued', 'waiting', 'scheduled', 'succeeded', 'failed', 'timed_out', 'stale', 'cancelled', 'skipped'];

export const isFinal = (run) => FINAL.includes(run.status);
export const holdsSlot = (run) => run.status === 'queued' || run.status === 'running';

const WORDS = { timed_out: 'timed out' };
export const word = (status) => WORDS[status] ?? status;

const SHAPES = {
  running: [['circle', { cx: 8, cy: 8, r: 5.5, fill: 'none' }], ['path', { d: 'M6.7 5.6v4.8L10.6 8z', class: 'solid' }]],
  queued: [['circle', { cx: 8, cy: 8, r: 5.5, fill: 'none' }], ['path', { d: 'M8 2.5A5.5 5.5 0 0 1 13.5 8H8z', class: 'solid' }]],
  waiting: [['circle', { cx: 3.6, cy: 8, r: 1.4, class: 'solid' }], ['circle', { cx: 8, cy: 8, r: 1.4, class: 'solid' }], ['circle', { cx: 12.4, cy: 8, r: 1.4, class: 'solid' }]],
  scheduled: [['rect', { x: 2.7, y: 3.5, width: 10.6, height: 9.8, rx: 1.6, fill: 'none' }], ['path', { d: 'M2.7 6.8h10.6M5.4 2v2.4M10.6 2v2.4', fill: 'none' }]],
  succeeded: [['path', { d: 'M3.2 8.4l3.2 3.2 6.4-7', fill: 'none' }]],
  failed: [['path', { d: 'M4 4l8 8M12 4l-8 8', fill: 'none' }]],
  timed_out: [['circle', { cx: 8, cy: 8, r: 5.5, fill: 'none' }], ['path', { d: 'M8 4.8V8l2.2 1.8', fill: 'none' }]],
  stale: [['path', { d: 'M8 2.8 14 13H2z', fill: 'none' }], ['path', { d: 'M8 6.6v3.2M8 11.3v.2', fill: 'none' }]],
  cancelled: [['circle', { cx: 8, cy: 8, r: 5.5, fill: 'none' }], ['path', { d: 'M4.2 11.8l7.6-7.6', fill: 'none' }]],
  skipped: [['path', { d: 'M3 4.5 7.4 8 3 11.5zM8 4.5 12.4 8 8 11.5z', class: 'solid' }]],
  free: [['circle', { cx: 8, cy: 8, r: 5.5, fill: 'none', 'stroke-dasharray': '2.4 2.2' }]],
  paused: [['path', { d: 'M5.6 4v8M10.4 4v8', fill: 'none' }]],
};

export function shape(status) {
  const parts = (SHAPES[status] ?? SHAPES.free).map(([tag, props]) => svg(tag, props));
  return svg(`svg.shape`, { viewBox: '0 0 16 16', 'aria-hidden': 'true' }, parts);
}

/** A status as shape, word and colour. */
export function badge(status, { title } = {}) {
  return h(`span.badge`, { class: `s-${status}`, title }, shape(status), word(status));
}

const REASONS = {
  no_worker: 'no worker that would take it has been seen',
  paused: 'paused',
  backoff: 'waits to be tried again',
  expired: 'was not started in time',
  superseded: 'a newer request took its place',
  worker_lost: 'its worker stopped sending heartbeats',
  conflict: 'the slot was taken',
  shutdown: 'its worker was shut down',
  timeout: 'took longer than it may',
  unkillable: 'its process could not be ended',
  forced: 'released by force',
  by_worker: 'said by the worker',
  too_many_waiting: 'too many were waiting',
};

/** A reason in words. */
export const reason = (name) => REASONS[name] ?? name?.replaceAll('_', ' ') ?? '';
