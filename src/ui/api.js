// The public API, as any client uses it.

import { learnClock } from './format.js';

const KEY = 'singletrack.key';

/** Where the dashboard is served, which may be under a path of a proxy's. */
export const base = new URL('..', import.meta.url).href.replace(/\/$/, '');

/** What the server refused, in its own words. */
export class Refused extends Error {
  constructor(status, problem, headers) {
    super(problem.detail || problem.title || `The server answered ${status}`);
    this.status = status;
    this.problem = problem;
    this.cause = (problem.type ?? '').replace('urn:singletrack:problem:', '');
    this.retryAfter = Number(headers.get('retry-after')) || null;
  }
}

/** The server could not be reached, or can't reach its database. */
export class Away extends Error {}

export const key = {
  get: () => sessionStorage.getItem(KEY),
  set: (value) => sessionStorage.setItem(KEY, value),
  forget: () => sessionStorage.removeItem(KEY),
};

/** Scopes that the key was seen to lack. Without keys everything is allowed. */
const missing = new Set();
export const may = (scope) => !missing.has(scope);
export const whyNot = (scope) => (may(scope) ? null : `This key has no scope “${scope}”`);

const listeners = { away: [], back: [], signin: [], scopes: [] };
export const on = (event, listener) => listeners[event].push(listener);
const tell = (event, detail) => listeners[event].forEach((listener) => listener(detail));

export function headers(more = {}) {
  return key.get() ? { authorization: `Bearer ${key.get()}`, ...more } : more;
}

/** Sends a request; the answer's body, or a `Refused` or `Away`. */
export async function request(method, path, { body, signal, also = {} } = {}) {
  let response;
  try {
    const init = { method, signal, cache: 'no-store', headers: headers(also) };
    if (body !== undefined) {
      init.body = JSON.stringify(body);
      init.headers['content-type'] = 'application/json';
    }
    response = await fetch(`${base}${path}`, init);
  } catch (error) {
    if (signal?.aborted) throw error;
    const away = new Away('The server does not answer.');
    tell('away', away);
    throw away;
  }
  return read(response, method);
}

export async function read(response, method = 'GET') {
  if (response.headers.has('date')) learnClock(response.headers.get('date'));
  const text = await response.text().catch(() => '');
  let answer = null;
  try {
    answer = text ? JSON.parse(text) : null;
  } catch {
    answer = { detail: text.slice(0, 300) };
  }
  if (response.ok) {
    tell('back');
    return answer;
  }
  const refused = new Refused(response.status, answer ?? {}, response.headers);
  if (response.status === 401) tell('signin', refused);
  if (response.status === 403) noteMissing(refused);
  // Who only looked is told by the banner; who wanted something is told by what they wanted.
  if (response.status >= 502 || response.status === 503) {
    const away = new Away(refused.message);
    tell('away', away);
    if (method === 'GET') throw away;
  } else {
    tell('back');
  }
  throw refused;
}

function noteMissing(refused) {
  const scope = /scope `(\w+)`/.exec(refused.problem.detail ?? '')?.[1];
  if (!scope || missing.has(scope)) return;
  missing.add(scope);
  tell('scopes');
}

/** Finds out what the key may, by requests that change nothing. */
export async function learnScopes() {
  missing.clear();
  if (!key.get()) return;
  const nothing = { dry_run: true, workflow_id: 'none', status: ['waiting'] };
  const tries = [
    ['enqueue', request('POST', '/api/v1/runs/cancel', { body: nothing })],
    ['admin', request('GET', '/api/v1/keys')],
  ];
  for (const [scope, tried] of tries) {
    await tried.catch((error) => error.status === 403 && missing.add(scope));
  }
  tell('scopes');
}

/** A query, without what is empty. */
export function query(params) {
  const entries = Object.entries(params).filter(([, value]) => value !== undefined && value !== null && value !== '');
  return entries.length ? `?${new URLSearchParams(entries)}` : '';
}

const id = encodeURIComponent;

export const get = (path, params = {}, options) => request('GET', `/api/v1${path}${query(params)}`, options);
export const post = (path, body = {}) => request('POST', `/api/v1${path}`, { body });

export const api = {
  workflows: (params) => get('/workflows', params),
  workflow: (name) => get(`/workflows/${id(name)}`),
  revisions: (name) => get(`/workflows/${id(name)}/revisions`, { limit: 20 }),
  next: (name) => get(`/schedules/${id(name)}/next`, { count: 5 }),
  pause: (name, reason) => post(`/workflows/${id(name)}/pause`, { reason }),
  resume: (name) => post(`/workflows/${id(name)}/resume`),
  queues: () => get('/queues'),
  pauseQueue: (name, reason) => post(`/queues/${id(name)}/pause`, { reason }),
  resumeQueue: (name) => post(`/queues/${id(name)}/resume`),
  start: (name, body) => post(`/workflows/${id(name)}/runs`, body),
  runs: (params) => get('/runs', params),
  counts: (params) => get('/runs/counts', params),
  run: (run) => get(`/runs/${id(run)}`),
  attempts: (run) => get(`/runs/${id(run)}/attempts`),
  refusals: (run) => get(`/runs/${id(run)}/refusals`),
  logs: (run, params, options) => get(`/runs/${id(run)}/logs`, params, options),
  events: (run, params) => get(`/runs/${id(run)}/events`, params),
  cancel: (run) => post(`/runs/${id(run)}/cancel`),
  rerun: (run) => post(`/runs/${id(run)}/rerun`),
  bulk: (what, body) => post(`/runs/${what}`, body),
  slots: (params) => get('/slots', params),
  workers: (params) => get('/workers', params),
  ready: () => request('GET', '/readyz'),
  system: () => get('/system'),
};

/** Everything of a paged list, up to `most` items; `all` says whether that was all. */
export async function everything(call, params = {}, most = 1000) {
  const items = [];
  let cursor;
  do {
    const page = await call({ ...params, limit: 200, cursor });
    items.push(...page.items);
    cursor = page.next_cursor;
  } while (cursor && items.length < most);
  return { items, all: !cursor };
}
