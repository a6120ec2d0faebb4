// What screens are made of.

import { Away, Refused, base, key } from './api.js';
import { fill, h, svg } from './dom.js';
import { absolute, duration, secondsBetween, time } from './format.js';
import { shape, word } from './status.js';

/** Where a screen is: `link('runs', {status: 'failed'})`. */
export function link(path, params = {}) {
  const entries = Object.entries(params).filter(([, value]) => value !== undefined && value !== null && value !== '');
  return `#/${path}${entries.length ? `?${new URLSearchParams(entries)}` : ''}`;
}

export const runLink = (id, params) => link(`runs/${encodeURIComponent(id)}`, params);
export const workflowLink = (id) => link(`workflows/${encodeURIComponent(id)}`);

const ICONS = {
  chevron: 'M6 4l4 4-4 4',
  copy: 'M5.5 5.5v-3h8v8h-3M2.5 5.5h8v8h-8z',
  search: 'M7 2.5a4.5 4.5 0 1 1 0 9 4.5 4.5 0 0 1 0-9zM10.4 10.4l3.4 3.4',
  play: 'M5 3.5v9l7-4.5z',
  sun: 'M8 5.2a2.8 2.8 0 1 1 0 5.6 2.8 2.8 0 0 1 0-5.6M8 1.5v1.3M8 13.2v1.3M1.5 8h1.3M13.2 8h1.3M3.4 3.4l.9.9M11.7 11.7l.9.9M3.4 12.6l.9-.9M11.7 4.3l.9-.9',
  moon: 'M13 9.6A5.6 5.6 0 0 1 6.4 3a5.6 5.6 0 1 0 6.6 6.6z',
  auto: 'M8 2.5a5.5 5.5 0 1 1 0 11 5.5 5.5 0 0 1 0-11M8 2.5v11M10.5 3.4v9.2M12.6 5.2v5.6',
  keys: 'M1.8 4h12.4v8H1.8zM4.4 6.6h.1M7 6.6h.1M9.6 6.6h.1M5 9.4h6',
};

export const icon = (name) => svg('svg.icon', { viewBox: '0 0 16 16', 'aria-hidden': 'true' }, svg('path', { d: ICONS[name] }));

export function button(text, onclick, { kind = '', title, disabled, why, label, name } = {}) {
  return h('button.button', { type: 'button', class: kind, title: why ?? title, onclick, disabled: disabled || Boolean(why), 'aria-label': label, 'data-name': name }, text);
}

/** The last results, oldest first: height is how long they took, colour and shape how they ended. */
export function strip(runs, size = 20) {
  const seconds = runs.map((run) => run.seconds ?? 0);
  const longest = Math.max(...seconds, 0.001);
  const cells = runs.slice(0, size).map((run, at) => {
    const height = 6 + Math.round(16 * Math.sqrt(seconds[at] / longest));
    const title = `${word(run.status)}${seconds[at] ? ` in ${duration(seconds[at])}` : ''}, ${absolute(run.finished_at)}`;
    return h('a.bar', { href: runLink(run.id), class: `s-${run.status}`, title, 'aria-label': title, style: { height: `${height}px` } });
  });
  const empty = Array.from({ length: Math.max(0, size - cells.length) }, () => h('span.bar.none'));
  return h('div.strip', null, empty, cells.reverse());
}

/** How long the attempt took, or takes; null where none is under way. */
export function took(run) {
  if (run.started_at && run.finished_at) return duration(secondsBetween(run.started_at, run.finished_at));
  return run.status === 'running' ? time(run.started_at, 'since') : null;
}

/** A bar between 0 and 1. */
export function meter(share, label, kind = '') {
  const width = `${Math.round(Math.min(1, Math.max(0, share)) * 100)}%`;
  return h('div.meter', { class: kind, role: 'img', 'aria-label': label, title: label }, h('span', { style: { width } }));
}

/** Text that a click copies. */
export function copyable(text, { what = 'text', code = true } = {}) {
  const copy = async (event) => {
    const from = event.currentTarget;
    await navigator.clipboard?.writeText(text).catch(() => {});
    from.classList.add('done');
    setTimeout(() => from.classList.remove('done'), 1200);
  };
  return h('div.copyable', null, h(code ? 'pre' : 'span', code ? { tabindex: 0 } : null, text), h('button.copy', { type: 'button', onclick: copy, 'aria-label': `Copy ${what}`, title: 'Copy' }, icon('copy')));
}

const quote = (text) => `'${text.replaceAll("'", "'\\''")}'`;

/** A request as one types it. */
export function curl(method, path, body) {
  const parts = [`curl -i${method === 'POST' ? '' : ` -X ${method}`} ${base}${path}`];
  if (key.get()) parts.push('-H "Authorization: Bearer $SINGLETRACK_API_KEY"');
  if (body !== undefined) parts.push("-H 'Content-Type: application/json'", `-d ${quote(JSON.stringify(body))}`);
  return copyable(parts.join(' \\\n  '), { what: 'command' });
}

export function empty(title, ...children) {
  return h('div.empty', null, h('h2', null, title), children);
}

/** Words of the server's: what stands between backticks is code. */
export const spoken = (text) => text.split('`').map((part, index) => (index % 2 ? h('code', null, part) : part));

/** An error one can act on. */
export function trouble(error, again) {
  if (error instanceof Away) return null; // the banner says it
  const detail = error instanceof Refused ? error.message : `${error.message ?? error}`;
  const mistakes = error.problem?.errors?.map((mistake) => h('li', null, h('code', null, mistake.pointer ?? mistake.parameter ?? mistake.header ?? ''), ' ', spoken(mistake.detail)));
  return h('div.trouble', { role: 'alert' }, h('strong', null, error.problem?.title ?? 'Something went wrong'), h('p', null, spoken(detail)), mistakes?.length ? h('ul', null, mistakes) : null, again ? (error.status === 404 ? h('a.button', { href: link('runs') }, 'All runs') : button('Try again', again)) : null);
}

export const loading = () => h('div.loading', { 'aria-label': 'Loading' }, h('span'), h('span'), h('span'));

export function toast(...children) {
  const place = document.getElementById('toasts');
  const element = h('div.toast', null, children);
  place.append(element);
  setTimeout(() => element.remove(), 6000);
}

/** A dialog; `build(close)` gives its content. Resolves with what `close` is given, or null. */
export function dialog(title, build) {
  return new Promise((resolve) => {
    const element = h('dialog', { 'aria-label': title });
    const close = (value = null) => {
      element.close();
      element.remove();
      resolve(value);
    };
    const draw = (...children) => fill(element, h('h2', null, title), children);
    draw(build(close, (...children) => draw(...children)));
    element.addEventListener('cancel', (event) => {
      event.preventDefault();
      close();
    });
    element.addEventListener('click', (event) => event.target === element && close());
    document.body.append(element);
    element.showModal();
    (element.querySelector('input, textarea') ?? element.querySelector('footer .primary:not(.danger)') ?? element.querySelector('footer .button'))?.focus();
  });
}

/** Asks before harm. `doing` runs while the dialog is open, which stays with what went wrong. */
export function confirm(title, text, { yes, kind = 'danger', field, doing }) {
  return dialog(title, (close, draw) => {
    let said = '';
    const view = (error, busy) => [
      h('div.text', null, text),
      field ? h('label.field', null, field, h('input', { name: 'said', oninput: (event) => (said = event.target.value), autocomplete: 'off' })) : null,
      error ? trouble(error) : null,
      h('footer', null, button('Keep as it is', () => close()), button(yes, act, { kind: `${kind} primary`, disabled: busy, name: 'confirm' })),
    ];
    const act = async () => {
      draw(view(null, true));
      try {
        close((await doing(said)) ?? true);
      } catch (error) {
        draw(view(error instanceof Away ? new Error('The server does not answer: nothing is known to have changed. Try again.') : error, false));
      }
    };
    return view();
  });
}

export function labels(map) {
  const entries = Object.entries(map ?? {});
  return entries.length ? h('span.labels', null, entries.map(([name, value]) => h('span.label', null, name, h('b', null, String(value))))) : null;
}

/** Facts: pairs of a name and a value; pairs without a value are left out. */
export function facts(...pairs) {
  const shown = pairs.filter(([, value]) => value !== null && value !== undefined && value !== false && value !== '');
  return h('dl.facts', null, shown.map(([name, value]) => h('div', null, h('dt', null, name), h('dd', null, value))));
}

export function json(value) {
  return copyable(JSON.stringify(value, null, 2), { what: 'JSON' });
}

export const panel = (title, ...children) => h('section.panel', null, h('h2', null, title), children);

export const freeBadge = () => h('span.badge.s-free', null, shape('free'), 'free');
export const pausedBadge = (title) => h('span.badge.s-paused', { title }, shape('paused'), 'paused');
