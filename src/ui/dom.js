// Elements, and how a screen that is drawn anew keeps what is there: focus, scroll positions, what is open.

const HANDLERS = ['onclick', 'oninput', 'onchange', 'onsubmit', 'onkeydown', 'onscroll'];
const SVG = 'http://www.w3.org/2000/svg';

function append(parent, children) {
  for (const child of children.flat(Infinity)) {
    if (child === null || child === undefined || child === false || child === '') continue;
    parent.append(child instanceof Node ? child : String(child));
  }
  return parent;
}

function create(element, names, props, children) {
  if (names.length) element.setAttribute('class', names.join(' '));
  for (const [name, value] of Object.entries(props ?? {})) {
    if (value === null || value === undefined || value === false) continue;
    if (HANDLERS.includes(name)) element[name] = value;
    else if (name === 'style') Object.assign(element.style, value);
    else if (name === 'class') element.setAttribute('class', [...names, value].join(' '));
    else if (name === 'key') element.dataset.key = value;
    else if (name === 'value') element.value = value;
    else element.setAttribute(name, value === true ? '' : value);
  }
  append(element, children);
  // A select has its value only when it has its options.
  if (element.localName === 'select' && props?.value !== undefined) element.value = props.value;
  return element;
}

/** An element: `h('a.link', {href}, 'text')`. Functions under `onclick` and the like are handlers; `key` is its identity in a list. */
export function h(tag, props, ...children) {
  const [name, ...names] = tag.split('.');
  return create(document.createElement(name), names, props, children);
}

/** The same for SVG. */
export function svg(tag, props, ...children) {
  const [name, ...names] = tag.split('.');
  return create(document.createElementNS(SVG, name), names, props, children);
}

/** Makes `children` the children of `target`, changing as little as it can. What has `data-own` keeps its own children. */
export function fill(target, ...children) {
  sync(target, append(document.createDocumentFragment(), children));
}

const keyOf = (node) => node.dataset?.key;
const alike = (old, fresh) => old.nodeName === fresh.nodeName && old.nodeType === fresh.nodeType && keyOf(old) === keyOf(fresh);

function sync(old, fresh) {
  const keyed = new Map();
  for (const child of old.children) if (keyOf(child)) keyed.set(keyOf(child), child);
  let at = old.firstChild;
  for (const next of [...fresh.childNodes]) {
    const known = keyOf(next) ? keyed.get(keyOf(next)) : at;
    if (!known || !alike(known, next)) {
      old.insertBefore(next, at);
      continue;
    }
    if (known === at) at = at.nextSibling;
    else old.insertBefore(known, at);
    update(known, next);
  }
  while (at) {
    const gone = at;
    at = at.nextSibling;
    gone.remove();
  }
}

function update(old, fresh) {
  if (old.nodeType !== Node.ELEMENT_NODE) {
    if (old.nodeValue !== fresh.nodeValue) old.nodeValue = fresh.nodeValue;
    return;
  }
  const theirs = (name) => name === 'style' || (name === 'open' && old.localName === 'details');
  for (const { name } of [...old.attributes]) if (!fresh.hasAttribute(name) && !theirs(name)) old.removeAttribute(name);
  for (const { name, value } of fresh.attributes) {
    if (!theirs(name) && old.getAttribute(name) !== value) old.setAttribute(name, value);
  }
  // By way of the object model, which a policy without inline styles allows.
  if (old.style.cssText !== fresh.style.cssText) old.style.cssText = fresh.style.cssText;
  for (const name of HANDLERS) if (old[name] !== fresh[name]) old[name] = fresh[name];
  if (old.hasAttribute('data-own')) return;
  sync(old, fresh);
  if ('value' in old && old !== document.activeElement && old.value !== fresh.value && old.localName !== 'li') old.value = fresh.value;
  if ('checked' in old && old.checked !== fresh.checked) old.checked = fresh.checked;
}
