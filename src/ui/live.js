// What happens, as it happens: the event stream, or looking again where there is none or where a proxy keeps it to itself.

import { Away, api, base, headers, on, read } from './api.js';

/** Silence after which a stream is taken for dead: the server says something every 15 seconds. */
const SILENCE = 40_000;
/** Time a stream has to say its first word. A proxy that keeps answers until they end never says one. */
const FIRST_WORD = 6_000;
const POLL = 2_000;

/**
 * Reads server-sent events by `fetch`, which can send a key where `EventSource` can't. Calls `took` with each event {event, id, data};
 * resolves when the server ends the stream, with the last id. Throws when there is no stream, or it falls silent.
 */
export async function stream(path, { last, signal, took, opened = () => {} }) {
  const own = new AbortController();
  signal.addEventListener('abort', () => own.abort(), { once: true });
  let watchdog = setTimeout(() => own.abort(), FIRST_WORD);
  const also = { accept: 'text/event-stream', ...(last ? { 'last-event-id': last } : {}) };
  try {
    const response = await fetch(`${base}${path}`, { headers: headers(also), signal: own.signal, cache: 'no-store' });
    if (response.status === 204) return { last, over: true };
    if (!response.ok) return await read(response);
    if (!response.headers.get('content-type')?.startsWith('text/event-stream')) throw new Error('no stream');
    const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
    let text = '';
    let event = { event: 'message', data: '' };
    for (;;) {
      const { value, done } = await reader.read();
      if (done) return { last, over: false };
      opened();
      clearTimeout(watchdog);
      watchdog = setTimeout(() => own.abort(), SILENCE);
      text += value;
      const lines = text.split('\n');
      text = lines.pop();
      for (const line of lines) {
        if (line === '') {
          if (event.data) took(event);
          event = { event: 'message', data: '' };
          continue;
        }
        const colon = line.indexOf(':');
        const [name, said] = colon < 0 ? [line, ''] : [line.slice(0, colon), line.slice(colon + 1).replace(/^ /, '')];
        if (name === 'data') event.data += said;
        else if (name === 'event') event.event = said;
        else if (name === 'id') last = event.id = said;
      }
    }
  } finally {
    clearTimeout(watchdog);
    own.abort();
  }
}

const listeners = new Set();
let mode = 'starting';
const modeListeners = [];

/** `live`, `polling`, `away` or `starting`. */
export const liveness = () => mode;
export const onLiveness = (listener) => modeListeners.push(listener);

function become(next) {
  if (mode === next) return;
  mode = next;
  modeListeners.forEach((listener) => listener(mode));
}

/** Calls `listener` with each change, or with null when anything may have changed; returns what ends it. */
export function listen(listener) {
  listeners.add(listener);
  return () => listeners.delete(listener);
}

const tell = (change) => listeners.forEach((listener) => listener(change));
const pause = (time) => new Promise((resolve) => setTimeout(resolve, time));

let last;
let polls = 0;
let connection = new AbortController();

/** Starts the stream anew, with another key. */
export function reconnect() {
  last = undefined;
  polls = 0;
  connection.abort();
}

/** Whether there is no stream to be had here: a proxy is in the way. */
async function follow() {
  connection = new AbortController();
  let answered = false;
  try {
    const ended = await stream('/api/v1/events', {
      last,
      signal: connection.signal,
      opened: () => {
        answered = true;
        become('live');
      },
      took: (event) => {
        if (event.event === 'reset') tell(null);
        else if (event.event === 'status' || event.event === 'cancel_requested') tell(JSON.parse(event.data));
      },
    });
    last = ended.last;
    return false;
  } catch (error) {
    if (error instanceof Away || error instanceof TypeError) become('away');
    return !answered && !(error instanceof Away) && !(error instanceof TypeError);
  }
}

/** Looks at the server until it answers. */
async function untilBack() {
  for (let wait = 500; ; wait = Math.min(wait * 1.6, 5000)) {
    await pause(wait);
    try {
      await api.ready();
      return;
    } catch (error) {
      if (!(error instanceof Away)) return;
    }
  }
}

let nudge = () => {};
on('away', () => {
  become('away');
  nudge();
});

/** Keeps the listeners up to date for as long as the page is there. */
export async function start() {
  for (;;) {
    if (mode === 'away') {
      await untilBack();
      become('starting');
      tell(null);
      polls = 0;
    }
    // Tried again now and then: the proxy, or the server, may have got better.
    if (polls % 30 === 0 && !(await follow())) {
      if (mode === 'live') become('starting');
      await pause(mode === 'away' ? 0 : 300);
      tell(null);
      continue;
    }
    if (mode === 'away') continue;
    become('polling');
    polls += 1;
    await Promise.race([pause(POLL), new Promise((resolve) => (nudge = resolve))]);
    if (!document.hidden && mode !== 'away') tell(null);
  }
}
