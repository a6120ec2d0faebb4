// The API, from its own description: what each operation takes and answers, as people read it.

import { fill, h } from './dom.js';
import { copyable } from './parts.js';

document.documentElement.dataset.theme = localStorage.getItem('singletrack.theme') ?? 'auto';

const METHODS = ['get', 'put', 'post', 'delete'];
const ORDER = ['workflows', 'runs', 'schedules', 'pauses', 'workers', 'keys', 'machines', 'legacy'];

/** Paragraphs, lists and `code`, which is all of Markdown that the descriptions have. */
function prose(text) {
  const inline = (line) => line.split(/(`[^`]+`)/).map((part) => (part.length > 2 && part.startsWith('`') ? h('code', null, part.slice(1, -1)) : part));
  const blocks = (text ?? '').split(/\n\s*\n/).filter((block) => block.trim());
  return h('div.prose', null, blocks.map((block) => {
    if (!block.startsWith('- ')) return h('p', null, inline(block.replaceAll('\n', ' ')));
    return h('ul', null, block.slice(2).split(/\n- /).map((item) => h('li', null, inline(item.replaceAll('\n', ' ')))));
  }));
}

const nameOf = (schema) => schema.$ref?.split('/').at(-1);
const schemaLink = (name) => h('a', { href: `#schema-${name}` }, name);

/** What kind of value it is, in a line. */
function kind(schema) {
  if (!schema || Object.keys(schema).length === 0) return ['any JSON'];
  if (schema.$ref) return [schemaLink(nameOf(schema))];
  const several = schema.oneOf ?? schema.anyOf ?? schema.allOf;
  if (several) return several.flatMap((one, at) => [at ? (schema.allOf ? ' and ' : ' or ') : '', ...kind(one)]);
  if (schema.enum) return [schema.enum.map((value) => JSON.stringify(value)).join(' or ')];
  const types = [schema.type].flat();
  if (types.includes('array')) return ['list of ', ...kind(schema.items), types.includes('null') ? ' or null' : ''];
  if (schema.additionalProperties && schema.additionalProperties !== true) return ['object of ', ...kind(schema.additionalProperties)];
  return [types.filter(Boolean).join(' or ') || (schema.properties ? 'object' : 'any JSON'), schema.format && !/^(u?int|double)/.test(schema.format) ? `, ${schema.format}` : ''];
}

/** What else is asked of it. */
function bounds(schema) {
  const { minimum, maximum, minLength, maxLength, minItems, maxItems, pattern } = schema ?? {};
  const range = (low, high, unit) => {
    if (low === undefined && high === undefined) return '';
    const from = low ?? 'any';
    return high === undefined ? `at least ${from}${unit}` : low === undefined ? `at most ${high}${unit}` : `${from} to ${high}${unit}`;
  };
  const said = [range(minimum, maximum, ''), range(minLength, maxLength, ' characters'), range(minItems, maxItems, ' entries')];
  const rest = [schema?.default === undefined ? '' : `default ${JSON.stringify(schema.default)}`, pattern ? h('code', null, pattern) : ''];
  return [...said, ...rest].filter(Boolean).flatMap((part, at) => [at ? ', ' : '', part]);
}

function row(name, schema, { description, required, example } = {}) {
  const text = description ?? schema?.description ?? (schema?.oneOf ?? []).find((one) => one.description)?.description;
  const limits = bounds(schema);
  const shown = example ?? schema?.example ?? schema?.examples?.[0];
  return h('tr', null,
    h('th', { scope: 'row' }, name, required ? h('em', null, 'required') : null),
    h('td.kind', null, kind(schema), limits.length ? [h('br'), limits] : null),
    h('td', null, prose(text), shown === undefined ? null : h('p.muted', null, 'e.g. ', h('code', null, typeof shown === 'string' ? shown : JSON.stringify(shown)))));
}

const table = (label, rows) => (rows.length ? h('table.rows', { 'aria-label': label }, h('tbody', null, rows)) : null);

function members(schema) {
  const of = (part) => Object.entries(part.properties ?? {}).map(([name, member]) => row(name, member, { required: part.required?.includes(name) }));
  const parts = [schema, ...(schema.allOf ?? []), ...(schema.oneOf ?? [])];
  return parts.flatMap(of);
}

/** A body that could be sent: what has to be there, and what has an example. */
function sample(schema, all, depth = 0) {
  if (!schema || depth > 4) return {};
  if (schema.$ref) return sample(all[nameOf(schema)], all, depth + 1);
  if (schema.example !== undefined) return schema.example;
  if (schema.examples?.length) return schema.examples[0];
  if (schema.enum) return schema.enum[0];
  if (schema.default !== undefined) return schema.default;
  if (schema.oneOf || schema.anyOf) return sample((schema.oneOf ?? schema.anyOf)[0], all, depth + 1);
  if (schema.allOf) return Object.assign({}, ...schema.allOf.map((part) => sample(part, all, depth + 1)));
  const type = [schema.type].flat()[0];
  if (type === 'array') return [sample(schema.items, all, depth + 1)];
  if (schema.properties) {
    const wanted = Object.entries(schema.properties).filter(([name, member]) => schema.required?.includes(name) || member.example !== undefined);
    return Object.fromEntries(wanted.map(([name, member]) => [name, sample(member, all, depth + 1)]));
  }
  return { string: schema.format === 'date-time' ? new Date().toISOString() : 'text', integer: schema.minimum ?? 1, number: 1, boolean: true }[type] ?? {};
}

function command(method, path, operation, all) {
  const given = (one) => one.example ?? (one.schema?.format === 'uuid' ? '$RUN' : `$${one.name.toUpperCase()}`);
  const filled = (operation.parameters ?? []).filter((one) => one.in === 'path').reduce((text, one) => text.replace(`{${one.name}}`, given(one)), path);
  const base = new URL('.', location.href).href.replace(/\/$/, '');
  const parts = [`curl -i${method === 'get' ? '' : ` -X ${method.toUpperCase()}`} "${base}${filled}"`];
  if ((operation.security ?? []).some((one) => one.api_key)) parts.push('-H "Authorization: Bearer $SINGLETRACK_API_KEY"');
  const body = operation.requestBody?.content?.['application/json'];
  if (body) parts.push(`-H 'Content-Type: application/json' -d '${JSON.stringify(body.example ?? sample(body.schema, all)).replaceAll("'", "'\\''")}'`);
  return copyable(parts.join(' \\\n  '), { what: 'command' });
}

function answer([status, response]) {
  const bodies = Object.entries(response.content ?? {}).map(([type, content]) => [type === 'application/json' ? '' : `${type}: `, ...kind(content.schema)]);
  const headers = Object.entries(response.headers ?? {}).map(([name, header]) => h('div.header', null, prose(`\`${name}\` ${header.description ?? ''}`)));
  const next = Object.entries(response.links ?? {}).flatMap(([name, to], at) => [at ? ', ' : '', h('a', { href: `#${to.operationId}` }, name)]);
  return h('tr', null, h('th', { scope: 'row' }, status), h('td.kind', null, bodies.length ? bodies : 'nothing'),
    h('td', null, prose(response.description), headers, next.length ? h('p.muted', null, 'Then: ', next) : null));
}

function operationPanel({ method, path, operation }, all) {
  const scope = (operation.security ?? []).find((one) => one.api_key)?.api_key[0];
  const body = operation.requestBody?.content ?? {};
  const parameters = (operation.parameters ?? []).map((one) => row(one.in === 'query' ? `?${one.name}` : one.in === 'header' ? `${one.name}:` : `{${one.name}}`, one.schema, one));
  return h('section.panel.operation', { id: operation.operationId, 'aria-labelledby': `${operation.operationId}-title` },
    h('header', null, h('h3', { id: `${operation.operationId}-title` }, operation.summary), h('code.path', null, h('span.method', { class: method }, method.toUpperCase()), path), h('span.muted.small', null, scope ? `scope ${scope}` : 'no key needed')),
    prose(operation.description), command(method, path, operation, all),
    parameters.length ? [h('h4', null, 'Parameters'), table('Parameters', parameters)] : null,
    Object.entries(body).map(([type, content]) => [h('h4', null, `Body, ${type}: `, kind(content.schema)), content.schema?.$ref ? table('Body', members(all[nameOf(content.schema)] ?? {})) : null]),
    h('h4', null, 'Answers'), table('Answers', Object.entries(operation.responses).map(answer)));
}

function schemaPanel([name, schema]) {
  const rows = members(schema);
  return h('section.panel.schema', { id: `schema-${name}`, 'aria-labelledby': `schema-${name}-title` }, h('h3', { id: `schema-${name}-title` }, name), prose(schema.description), rows.length ? null : h('p.muted', null, kind(schema)), table('Members', rows));
}

function show(described) {
  const all = described.components?.schemas ?? {};
  const operations = Object.entries(described.paths).flatMap(([path, item]) => METHODS.filter((method) => item[method]).map((method) => ({ method, path, operation: item[method] })));
  const named = Object.groupBy(operations, (one) => one.operation.tags?.[0] ?? 'others');
  const groups = Object.entries(named).sort(([one], [other]) => ORDER.indexOf(one) - ORDER.indexOf(other));
  const search = h('input', { type: 'search', placeholder: 'Find an operation', 'aria-label': 'Find an operation' });
  const list = h('div');
  const draw = () => {
    const wanted = search.value.toLowerCase();
    const found = ({ method, path, operation }) => `${method} ${path} ${operation.summary} ${operation.operationId}`.toLowerCase().includes(wanted);
    fill(list, groups.map(([name, some]) => [name, some.filter(found)]).filter(([, some]) => some.length).map(([name, some]) => [
      h('h2', { key: `group-${name}` }, name),
      some.map(({ method, operation }) => h('a', { href: `#${operation.operationId}`, key: operation.operationId }, h('span.method', { class: method }, method.toUpperCase()), operation.summary)),
    ]));
  };
  search.oninput = draw;
  draw();
  fill(document.querySelector('#contents'), search, list);
  fill(document.querySelector('#main'),
    h('div.head', null, h('h1', null, `${described.info.title} API`), h('span.sub', null, described.info.version)), prose(described.info.description),
    groups.map(([name, some]) => [h('h2.group', null, name), some.map((one) => operationPanel(one, all))]),
    h('h2.group', null, 'Schemas'), Object.entries(all).map(schemaPanel));
  // The place that the address names was not there when the page was loaded.
  if (location.hash.length > 1) document.getElementById(decodeURIComponent(location.hash.slice(1)))?.scrollIntoView();
}

try {
  const response = await fetch('openapi.json');
  if (!response.ok) throw new Error(`it answered ${response.status}`);
  show(await response.json());
} catch (error) {
  fill(document.querySelector('#main'), h('div.trouble', { role: 'alert' }, h('strong', null, 'The description of the API can’t be read.'), ` ${error.message}. Is the service running? `, h('a', { href: 'openapi.json' }, 'openapi.json')));
}
