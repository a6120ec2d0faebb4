// The log of a run: of any length, because only the lines in sight are elements.

import { Away, api } from './api.js';
import { PLAIN, dress, pieces, plain } from './ansi.js';
import { h } from './dom.js';
import { absolute, clock, number, plural } from './format.js';
import { stream } from './live.js';
import { button, icon, runLink } from './parts.js';

/** Height of a line, in pixels; as in the style sheet. */
const LINE = 20;
/** Lines beyond those in sight. */
const SPARE = 20;
const POLL = 1000;

const pause = (time) => new Promise((resolve) => setTimeout(resolve, time));

/** A log that follows its run until it is over. `isOver` says whether the run is; `line` is the line to show first. */
export function log(runId, { line, isOver }) {
  const lines = [];
  const open = new Map();
  const gone = new AbortController();
  let attempt = null;
  let following = !line;
  let marked = line;
  let text = '';
  let hits = [];
  let hit = -1;
  let drawn = false;
  let over = false;
  let placed = false;
  let top = 0;

  const scroller = h('div.lines', { tabindex: 0, role: 'log', 'aria-label': 'Log', 'aria-live': 'off', onscroll: scrolled });
  const spacer = h('div.spacer');
  const view = h('div.window');
  scroller.append(spacer, view);
  const search = h('input', { type: 'search', placeholder: 'Search the log', 'aria-label': 'Search the log', oninput: sought, onkeydown: (event) => event.key === 'Enter' && turn(event.shiftKey ? -1 : 1) });
  const found = h('span.found', { 'aria-live': 'polite' });
  const follow = button('Follow', () => setFollowing(!following), { kind: 'quiet', title: 'Stay at the end (f)', name: 'follow' });
  const count = h('span.muted.total');
  const element = h('div.log', { 'data-own': true }, h('div.logbar', null, h('label.search', null, icon('search'), search), found, h('span.grow'), count, follow, button('Download', download, { kind: 'quiet' })), scroller);

  function took(entry) {
    if (entry.attempt !== attempt) {
      attempt = entry.attempt;
      if (attempt > 1 || lines.length) push({ text: `attempt ${attempt}`, stream: 'mark', at: entry.at });
    }
    const key = `${entry.fence} ${entry.stream}`;
    // A piece may end in the middle of a line, which the next one of its stream goes on with.
    let last = open.get(key);
    const parts = entry.text.split('\n');
    parts.forEach((part, index) => {
      if (index === 0 && last) last.text += part;
      else if (index < parts.length - 1 || part) last = push({ text: part, stream: entry.stream, at: entry.at, attempt: entry.attempt });
      else last = null;
    });
    if (parts.length > 1 && parts.at(-1) === '') last = null;
    open.set(key, last);
    changed();
  }

  function push(made) {
    lines.push(made);
    return made;
  }

  const shown = (made) => {
    const at = made.text.replace(/\r+$/, '').lastIndexOf('\r');
    return at < 0 ? made.text.replace(/\r+$/, '') : made.text.slice(at + 1);
  };

  function changed() {
    if (drawn) return;
    drawn = true;
    requestAnimationFrame(() => {
      drawn = false;
      draw();
    });
  }

  function draw() {
    spacer.style.height = `${lines.length * LINE}px`;
    // As high as what is in it, and at most as the style sheet says: a box whose content does not count needs a height of its own.
    scroller.style.height = `${Math.max(3, lines.length) * LINE}px`;
    count.textContent = plural(lines.length, 'line');
    scroller.dataset.lines = lines.length;
    follow.setAttribute('aria-pressed', String(following));
    if (following) scroller.scrollTop = scroller.scrollHeight;
    else if (marked && !placed && marked <= lines.length && scroller.clientHeight) {
      placed = true;
      scroller.scrollTop = Math.max(0, marked * LINE - scroller.clientHeight / 2);
    }
    const first = Math.max(0, Math.floor(scroller.scrollTop / LINE) - SPARE);
    const last = Math.min(lines.length, first + Math.ceil((scroller.clientHeight || 400) / LINE) + 2 * SPARE);
    view.style.transform = `translateY(${first * LINE}px)`;
    view.replaceChildren(...lines.slice(first, last).map((made, index) => row(made, first + index + 1)));
    if (!lines.length) view.replaceChildren(h('p.muted.nothing', null, over ? 'It printed nothing.' : 'Nothing printed yet.'));
  }

  /** The colours that are on when a line begins: of those before it in its stream, looked at as far as it pays. */
  function stateBefore(at) {
    const { stream: name } = lines[at];
    for (let before = at - 1; before >= Math.max(0, at - 200); before -= 1) {
      const made = lines[before];
      if (made.stream !== name) continue;
      if (made.state) return made.state;
      if (!made.text.includes('\x1b')) continue;
      return pieces(shown(made), PLAIN).state;
    }
    return PLAIN;
  }

  function row(made, at) {
    const body = h('span.said');
    const { parts, state } = pieces(shown(made), stateBefore(at - 1));
    made.state = state;
    for (const part of parts) {
      const piece = h('span', null, ...marks(part.text));
      dress(piece, part.state);
      body.append(piece);
    }
    const names = ['line', `of-${made.stream}`, at === marked ? 'marked' : '', hits[hit] === at - 1 ? 'here' : ''].filter(Boolean);
    return h(`div.${names.join('.')}`, null, h('a.no', { href: runLink(runId, { line: at }), onclick: mark, title: `${absolute(made.at)}: copy the address of this line`, 'data-line': at }, String(at)), h('span.at', null, clock(made.at)), body);
  }

  function marks(said) {
    if (!text) return [said];
    const low = said.toLowerCase();
    const out = [];
    let from = 0;
    for (let at = low.indexOf(text); at >= 0; at = low.indexOf(text, from)) {
      out.push(said.slice(from, at), h('mark', null, said.slice(at, at + text.length)));
      from = at + text.length;
    }
    return [...out, said.slice(from)];
  }

  function mark(event) {
    event.preventDefault();
    marked = Number(event.currentTarget.dataset.line);
    history.replaceState(null, '', runLink(runId, { line: marked }));
    navigator.clipboard?.writeText(location.href).catch(() => {});
    setFollowing(false);
  }

  function scrolled() {
    const atEnd = scroller.scrollTop + scroller.clientHeight >= scroller.scrollHeight - LINE;
    // What is added moves the end away; only whoever goes up does not want to stay there.
    if (scroller.scrollTop < top - 1) following = false;
    else if (atEnd && lines.length && !marked) following = true;
    top = scroller.scrollTop;
    changed();
  }

  function setFollowing(next) {
    following = next;
    if (next) marked = undefined;
    draw();
  }

  function show(at) {
    following = false;
    scroller.scrollTop = Math.max(0, at * LINE - scroller.clientHeight / 2);
    draw();
  }

  function sought() {
    text = search.value.toLowerCase();
    hits = [];
    if (text) lines.forEach((made, at) => plain(shown(made)).toLowerCase().includes(text) && hits.push(at));
    hit = -1;
    found.textContent = text ? `${number(hits.length)} lines` : '';
    if (hits.length) turn(1);
    else draw();
  }

  function turn(by) {
    if (!hits.length) return;
    hit = (hit + by + hits.length) % hits.length;
    found.textContent = `${number(hit + 1)} of ${number(hits.length)}`;
    show(hits[hit]);
  }

  function download() {
    const file = URL.createObjectURL(new Blob([lines.map((made) => `${plain(shown(made))}\n`).join('')], { type: 'text/plain' }));
    const to = h('a', { href: file, download: `${runId}.log` });
    to.click();
    URL.revokeObjectURL(file);
  }

  /** Reads page by page; the last one again and again, for what was added to it. */
  async function poll() {
    const seen = new Set();
    let cursor;
    while (!gone.signal.aborted) {
      const ended = isOver();
      try {
        const page = await api.logs(runId, { limit: 200, cursor }, { signal: gone.signal });
        for (const entry of page.items) {
          const id = `${entry.fence} ${entry.stream} ${entry.seq}`;
          if (seen.has(id)) continue;
          seen.add(id);
          took(entry);
        }
        if (page.next_cursor) {
          cursor = page.next_cursor;
          seen.clear();
          continue;
        }
        if (ended) return;
      } catch (error) {
        if (!(error instanceof Away)) throw error;
      }
      await pause(POLL);
    }
  }

  async function read() {
    let last;
    for (;;) {
      let opened = false;
      try {
        const ended = await stream(`/api/v1/runs/${encodeURIComponent(runId)}/logs?follow=true`, {
          last,
          signal: gone.signal,
          opened: () => (opened = true),
          took: (event) => {
            if (event.event === 'end') over = true;
            else if (event.event === 'log') took(JSON.parse(event.data));
            last = event.id ?? last;
          },
        });
        if (over || ended.over) return;
      } catch (error) {
        if (gone.signal.aborted) return;
        // There is none here, or it does not get through: as long as nothing came of it, another way is open.
        if (!opened && last === undefined && !(error instanceof TypeError)) return poll();
      }
      await pause(POLL);
    }
  }

  read()
    .catch((error) => gone.signal.aborted || console.error(error))
    .finally(() => {
      over = true;
      draw();
    });
  draw();

  return {
    element,
    toggle: () => setFollowing(!following),
    dispose: () => gone.abort(),
    /** Draws it where it was not in sight before. */
    draw: changed,
  };
}
