// Numbers exact, times relative with the absolute one on hover.

import { h } from './dom.js';

let ahead = 0;

/** Takes the server's clock from an answer, so that a wrong one here makes no age wrong. */
export function learnClock(date) {
  const difference = Date.parse(date) - Date.now();
  if (Number.isFinite(difference)) ahead = Math.abs(difference) > 2000 ? difference : 0;
}

/** Now, by the server's clock, in milliseconds. */
export const now = () => Date.now() + ahead;

export const number = (value) => value.toLocaleString('en-US');

export const plural = (count, one, many = `${one}s`) => `${number(count)} ${count === 1 ? one : many}`;

export const percent = (share) => (share === 1 ? '100%' : share === 0 ? '0%' : `${(share * 100).toFixed(share > 0.99 || share < 0.1 ? 1 : 0)}%`);

const two = (value) => String(value).padStart(2, '0');

/** A duration in seconds: 0.31 s, 12.4 s, 3m 05s, 2h 03m, 4d 02h. */
export function duration(seconds) {
  if (seconds === null || seconds === undefined || Number.isNaN(seconds)) return '–';
  if (seconds < 0) return `−${duration(-seconds)}`;
  if (seconds < 0.995) return `${Math.round(seconds * 1000)} ms`;
  if (seconds < 9.95) return `${seconds.toFixed(1)} s`;
  const whole = Math.round(seconds);
  if (whole < 60) return `${whole} s`;
  if (whole < 3600) return `${Math.floor(whole / 60)}m ${two(whole % 60)}s`;
  if (whole < 86400) return `${Math.floor(whole / 3600)}h ${two(Math.floor((whole % 3600) / 60))}m`;
  return `${Math.floor(whole / 86400)}d ${two(Math.floor((whole % 86400) / 3600))}h`;
}

/** A duration for the eye only, in steps that do not flicker. */
export function rough(seconds) {
  const whole = Math.max(0, Math.floor(seconds));
  if (whole < 60) return `${whole}s`;
  if (whole < 3600) return `${Math.floor(whole / 60)}m`;
  if (whole < 86400) return `${Math.floor(whole / 3600)}h`;
  return `${Math.floor(whole / 86400)}d`;
}

export const secondsBetween = (from, to) => (Date.parse(to) - Date.parse(from)) / 1000;

/** Seconds since a time, by the server's clock. */
export const age = (at) => (now() - Date.parse(at)) / 1000;

const DATE = new Intl.DateTimeFormat('en-GB', { day: 'numeric', month: 'short', year: 'numeric', hour: '2-digit', minute: '2-digit', second: '2-digit', timeZoneName: 'short' });
const CLOCK = new Intl.DateTimeFormat('en-GB', { hour: '2-digit', minute: '2-digit', second: '2-digit', fractionalSecondDigits: 3 });

export const absolute = (at) => DATE.format(new Date(at));

/** A time on the clocks of `zone`; of UTC, where this browser does not know that one. */
export function absoluteIn(zone, at) {
  const words = { weekday: 'short', day: 'numeric', month: 'short', year: 'numeric', hour: '2-digit', minute: '2-digit', second: '2-digit', timeZoneName: 'short' };
  try {
    return new Date(at).toLocaleString('en-GB', { ...words, timeZone: zone });
  } catch {
    return new Date(at).toLocaleString('en-GB', { ...words, timeZone: 'UTC' });
  }
}

export const clock = (at) => CLOCK.format(new Date(at));

const WORDS = {
  ago: (at) => (age(at) < 0 ? (age(at) > -1.5 ? 'now' : `in ${rough(-age(at) + 0.5)}`) : age(at) < 1.5 ? 'now' : `${rough(age(at))} ago`),
  since: (at) => duration(Math.max(0, Math.floor(age(at)))).replace(/^0 ms$/, '0 s').replace('.0 s', ' s'),
};

/** A time as its distance from now, which goes on by itself: `ago` (3m ago, in 2h) or `since` (3m 05s). */
export function time(at, words = 'ago') {
  if (!at) return '–';
  return h('time', { datetime: at, title: `${absolute(at)} (${at})`, 'data-words': words }, WORDS[words](at));
}

setInterval(() => {
  if (document.hidden) return;
  for (const element of document.querySelectorAll('time[data-words]')) {
    const text = WORDS[element.dataset.words](element.dateTime);
    if (element.textContent !== text) element.textContent = text;
  }
}, 1000);

export function bytes(count) {
  const power = count < 1024 ? 0 : Math.min(4, Math.floor(Math.log2(count) / 10));
  return `${power ? (count / 1024 ** power).toFixed(1) : count} ${['B', 'KiB', 'MiB', 'GiB', 'TiB'][power]}`;
}

export const shortId = (id) => `${id.slice(0, 8)}…${id.slice(-4)}`;
