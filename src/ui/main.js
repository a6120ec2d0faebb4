// The frame around the screens: which one the address names, when it is read anew, and what is said about the server.

import { Away, on, learnScopes } from './api.js';
import { fill, h } from './dom.js';
import { time } from './format.js';
import { listen, liveness, onLiveness, start } from './live.js';
import { button, dialog, icon, link, loading, trouble } from './parts.js';
import { run } from './run.js';
import { runs } from './runs.js';
import { signIn, signedIn, signOut } from './signin.js';
import { slots } from './slots.js';
import { system } from './system.js';
import { workers } from './workers.js';
import { workflow } from './workflow.js';

const MAIN = document.getElementById('main');
const SCREENS = [
  ['', 'Slots', 's'],
  ['runs', 'Runs', 'r'],
  ['workers', 'Workers', 'w'],
  ['system', 'System', 'y'],
];
/** Time between two reads for changes that come one after the other. */
const CALM = 800;
/** How often a screen with ages is read anew while nothing happens: a heartbeat is no change of status, and told by no event. */
const AGES = 10_000;

function route() {
  const [path, search] = location.hash.replace(/^#\/?/, '').split('?');
  const parts = path.split('/').filter(Boolean).map(decodeURIComponent);
  return { parts, params: new URLSearchParams(search ?? '') };
}

function screenOf({ parts: [name, id], params }, redraw) {
  if (name === 'runs') return id ? run(id, params) : runs(params);
  if (name === 'workflows' && id) return workflow(id);
  if (name === 'workers') return workers();
  if (name === 'system') return system();
  return slots(params, redraw);
}

let screen;
let readAt = 0;
let reading = false;
let stale = false;
let timer;
let fault = null;
let lastGood = null;

function draw() {
  document.title = `${screen.title} · Singletrack`;
  fill(MAIN, fault ? trouble(fault, () => refresh(true)) : null, screen.ready ? screen.view() : fault || liveness() === 'away' ? null : loading());
}

/** Reads the screen anew: soon, and not while it is being read. */
function refresh(atOnce = false) {
  stale = true;
  clearTimeout(timer);
  if (reading) return;
  timer = setTimeout(read, atOnce ? 0 : Math.max(120, readAt + CALM - Date.now()));
}

async function read() {
  const reads = screen;
  [reading, stale, readAt] = [true, false, Date.now()];
  try {
    await reads.load();
    if (reads !== screen) return;
    reads.ready = true;
    [fault, lastGood] = [null, new Date()];
  } catch (error) {
    if (reads !== screen) return;
    fault = error instanceof Away || error.status === 401 ? null : error;
    if (fault && fault.status === undefined) console.error(fault);
  } finally {
    reading = false;
    if (reads === screen) draw();
    if (stale) refresh();
  }
}

function show() {
  screen?.dispose?.();
  const before = screen?.title;
  fault = null;
  const own = screenOf(route(), () => own === screen && draw());
  screen = own;
  drawTop();
  if (before !== screen.title) {
    MAIN.replaceChildren();
    window.scrollTo(0, 0);
  }
  draw();
  refresh(true);
}

const THEMES = { auto: 'as the system', light: 'light', dark: 'dark' };
const ICONS = { auto: 'auto', light: 'sun', dark: 'moon' };
const theme = () => localStorage.getItem('singletrack.theme') ?? 'auto';

function nextTheme() {
  const names = Object.keys(THEMES);
  localStorage.setItem('singletrack.theme', names[(names.indexOf(theme()) + 1) % names.length]);
  drawTop();
}

const STATE = {
  live: ['live', 'Changes are shown as they happen'],
  polling: ['every 2 s', 'There is no event stream here (a proxy may keep it back): looked at again every two seconds'],
  away: ['offline', 'The server does not answer'],
  starting: ['connecting', 'Connecting'],
};

function drawTop() {
  document.documentElement.dataset.theme = theme();
  const here = route().parts[0] ?? '';
  const [word, title] = STATE[liveness()];
  const current = (name) => here === name || (name === '' && here === 'workflows');
  fill(
    document.getElementById('top'),
    h('a.brand', { href: link('') }, h('img', { src: 'ui/icon.svg', alt: '', width: 22, height: 22 }), 'Singletrack'),
    h('nav', { 'aria-label': 'Screens' }, SCREENS.map(([name, text]) => h('a', { href: link(name), 'aria-current': current(name) ? 'page' : null }, text))),
    h('div.tools', null,
      h('span.liveness', { class: liveness(), title }, h('i'), h('span', null, word)),
      signedIn() ? button('Sign out', signOut, { kind: 'quiet' }) : null,
      button(icon(ICONS[theme()]), nextTheme, { kind: 'quiet square', label: `Colours: ${THEMES[theme()]}`, title: `Colours: ${THEMES[theme()]}` }),
      button(icon('keys'), help, { kind: 'quiet square wide-only', label: 'Keyboard shortcuts', title: 'Keyboard shortcuts (?)' })),
  );
}

function drawBanner() {
  const away = liveness() === 'away';
  document.body.classList.toggle('away', away);
  const since = lastGood ? [' What you see is ', time(lastGood.toISOString(), 'since'), ' old.'] : '';
  fill(document.getElementById('banner'), away ? h('p', null, h('strong', null, 'The server does not answer.'), since, ' Trying again by itself.') : null);
}

function help() {
  const rows = [['g then s, r, w, y', 'Slots, Runs, Workers, System'], ['/', 'Search, or filter'], ['j and k', 'Next and previous row'], ['Enter', 'Open it'], ['f', 'Follow the log, or stop'], ['?', 'This list']];
  dialog('Keyboard', (close) => [h('dl.shortcuts', null, rows.map(([keys, what]) => h('div', null, h('dt', null, keys.split(' ').map((word) => (['then', 'and', 's,', 'r,', 'w,'].includes(word) && word.length > 2 ? ` ${word} ` : h('kbd', null, word.replace(',', ''))))), h('dd', null, what)))), h('footer', null, button('Close', () => close(), { kind: 'primary' }))]);
}

function step(by) {
  const rows = [...MAIN.querySelectorAll('[data-row] a[data-open]')];
  if (!rows.length) return;
  const at = rows.indexOf(document.activeElement);
  const next = rows[Math.min(rows.length - 1, Math.max(0, at + by))];
  next.focus();
  next.scrollIntoView({ block: 'nearest' });
}

let going = 0;

document.addEventListener('keydown', (event) => {
  const typing = event.target.closest('input, textarea, select, dialog');
  if (typing || event.ctrlKey || event.metaKey || event.altKey) return;
  const to = SCREENS.find(([, , letter]) => letter === event.key);
  if (to && Date.now() - going < 1500) location.hash = link(to[0]);
  else if (event.key === 'j') step(1);
  else if (event.key === 'k') step(-1);
  else if (event.key === '?') help();
  else if (event.key === '/') {
    MAIN.querySelector('input[type=search]')?.focus();
    event.preventDefault();
  } else screen?.pressed?.(event.key);
  going = event.key === 'g' ? Date.now() : 0;
});

window.addEventListener('hashchange', show);
document.addEventListener('visibilitychange', () => document.hidden || refresh());
onLiveness(() => {
  drawTop();
  drawBanner();
  draw();
});
on('signin', (refused) => signIn(refused, () => (drawTop(), refresh(true))));
on('scopes', () => screen && draw());
listen((change) => {
  if (!document.hidden && (change === null || screen.wants?.(change) !== false)) refresh();
});
document.addEventListener('singletrack:changed', () => refresh(true));
setInterval(() => screen.ages && !document.hidden && liveness() !== 'away' && refresh(), AGES);

show();
learnScopes();
start();
