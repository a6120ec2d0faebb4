// Colours of terminals (SGR) in a line of a log; what else an escape sequence asks for is left out.

const SEQUENCE = /\x1b(?:\[([0-9;:]*)([@-~])|\][^\x07\x1b]*(?:\x07|\x1b\\)|[@-Z\\^_])/g;
const OTHERS = /[\x00-\x08\x0b\x0c\x0e-\x1a\x1c-\x1f\x7f]/g;

/** A state that nothing was said about. */
export const PLAIN = Object.freeze({});

const LEVELS = [0, 95, 135, 175, 215, 255];

function palette(index) {
  if (index < 16) return index;
  if (index > 231) return `rgb(${Array(3).fill(8 + (index - 232) * 10).join(',')})`;
  const cube = index - 16;
  return `rgb(${[Math.floor(cube / 36), Math.floor(cube / 6) % 6, cube % 6].map((level) => LEVELS[level]).join(',')})`;
}

function apply(state, codes) {
  let next = { ...state };
  for (let at = 0; at < codes.length; at += 1) {
    const code = codes[at];
    const extended = () => {
      if (codes[at + 1] === 5) {
        at += 2;
        return palette(codes[at] ?? 0);
      }
      if (codes[at + 1] !== 2) return undefined;
      at += 4;
      return `rgb(${codes.slice(at - 2, at + 1).join(',')})`;
    };
    if (code === 0) next = {};
    else if (code === 1) next.bold = true;
    else if (code === 2) next.dim = true;
    else if (code === 3) next.italic = true;
    else if (code === 4) next.underline = true;
    else if (code === 7) next.inverse = true;
    else if (code === 22) next.bold = next.dim = undefined;
    else if (code === 23) next.italic = undefined;
    else if (code === 24) next.underline = undefined;
    else if (code === 27) next.inverse = undefined;
    else if (code >= 30 && code <= 37) next.color = code - 30;
    else if (code === 38) next.color = extended();
    else if (code === 39) next.color = undefined;
    else if (code >= 40 && code <= 47) next.ground = code - 40;
    else if (code === 48) next.ground = extended();
    else if (code === 49) next.ground = undefined;
    else if (code >= 90 && code <= 97) next.color = code - 82;
    else if (code >= 100 && code <= 107) next.ground = code - 92;
  }
  return next;
}

/** The pieces of a line, each with its state, and the state at its end. */
export function pieces(line, state = PLAIN) {
  if (!line.includes('\x1b')) return { parts: [{ text: line.replace(OTHERS, ''), state }], state };
  const parts = [];
  let from = 0;
  for (const match of line.matchAll(SEQUENCE)) {
    if (match.index > from) parts.push({ text: line.slice(from, match.index).replace(OTHERS, ''), state });
    if (match[2] === 'm') state = apply(state, (match[1] || '0').split(/[;:]/).map(Number));
    from = match.index + match[0].length;
  }
  if (from < line.length) parts.push({ text: line.slice(from).replace(OTHERS, '').replaceAll('\x1b', ''), state });
  return { parts, state };
}

/** The text without any of it. */
export const plain = (line) => (line.includes('\x1b') ? line.replace(SEQUENCE, '') : line).replace(OTHERS, '');

/** Dresses `element` as `state` says. */
export function dress(element, state) {
  const names = ['bold', 'dim', 'italic', 'underline', 'inverse'].filter((name) => state[name]).map((name) => `t-${name}`);
  for (const [kind, value] of [['f', state.color], ['b', state.ground]]) {
    if (typeof value === 'number') names.push(`t-${kind}${value}`);
    else if (value) element.style[kind === 'f' ? 'color' : 'backgroundColor'] = value;
  }
  if (names.length) element.className = names.join(' ');
}
