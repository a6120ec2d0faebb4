// Signing in with a key, where the server asks for one.

import { base, headers, key, learnScopes } from './api.js';
import { h } from './dom.js';
import { reconnect } from './live.js';
import { button, dialog, trouble } from './parts.js';

let open = false;

export const signedIn = () => key.get() !== null;

export function signOut() {
  key.forget();
  location.reload();
}

/** Asks for a key until the server takes one. It is kept for this tab alone, and sent to nobody else. */
export async function signIn(refused, signedInNow) {
  if (open) return;
  open = true;
  const wrong = key.get() ? refused : null;
  key.forget();
  await dialog('Sign in', (close, draw) => {
    let said = '';
    const view = (error) => [
      h('p.text', null, 'This service asks for a key. Whoever runs it makes one with ', h('code', null, 'singletrack keys create'), '.'),
      h('form', { onsubmit: enter },
        h('label.field', null, 'Key', h('input', { name: 'key', type: 'password', autocomplete: 'off', spellcheck: 'false', placeholder: 'st_…', oninput: (event) => (said = event.target.value.trim()) })),
        h('p.muted', null, 'It is kept in this tab until you close it, or sign out.'),
        error ? trouble(error) : null,
        h('footer', null, button('Sign in', enter, { kind: 'primary' }))),
    ];
    const enter = async (event) => {
      event.preventDefault();
      if (!/^[\x21-\x7e]+$/.test(said)) return draw(view(new Error('That is not a key: one looks like st_3f6d2a1b4c5d_…')));
      key.set(said);
      const response = await fetch(`${base}/api/v1/runs?limit=1`, { headers: headers() }).catch(() => null);
      if (response && response.status !== 401) return close(true);
      key.forget();
      const problem = await response?.json().catch(() => null);
      draw(view(new Error(problem?.detail ?? 'The server does not answer. Try again.')));
    };
    return view(wrong);
  });
  open = false;
  if (!key.get()) return;
  reconnect();
  await learnScopes();
  signedInNow();
}
