-- API keys, and who changed what besides runs.
-- Safe beside a replica of the version before: it reads and writes neither, and goes on letting in whoever reaches it, which is
-- loopback only.

create table api_keys (
    id           text        not null,
    name         text        not null,
    secret_hash  bytea       not null,
    scopes       text[]      not null,
    workflows    text[],
    created_at   timestamptz not null default now(),
    created_by   text        not null,
    expires_at   timestamptz,
    revoked_at   timestamptz,
    revoked_by   text,
    last_used_at timestamptz,

    constraint api_keys_pkey primary key (id),
    constraint api_keys_name_length check (char_length(name) between 1 and 128),
    constraint api_keys_secret_hash_is_sha256 check (octet_length(secret_hash) = 32),
    constraint api_keys_scopes_known check (cardinality(scopes) > 0 and scopes <@ array['read', 'enqueue', 'work', 'admin']),
    constraint api_keys_workflows_some check (cardinality(workflows) > 0),
    constraint api_keys_revoked_by_somebody check ((revoked_at is null) = (revoked_by is null))
);
-- A name stands for one key in the history of runs.
create unique index api_keys_name on api_keys (name) where revoked_at is null;
comment on table api_keys is 'Who may use the API. As soon as there is a row, revoked or not, every request needs a key; so rows are never deleted.';
comment on column api_keys.id is 'The part of the key that is no secret: st_<id>_<secret>.';
comment on column api_keys.name is 'The actor in run_events and audit_log. Of keys that are not revoked no two have the same.';
comment on column api_keys.secret_hash is 'SHA-256 of the secret. It has 256 random bits, so that nothing slower is needed: there is nothing to guess.';
comment on column api_keys.scopes is 'What it may: read, enqueue, work; admin may all of it.';
comment on column api_keys.workflows is 'Patterns of full workflow ids, * for any characters: others do not exist for this key. Null: all workflows.';
comment on column api_keys.created_at is 'When it was made.';
comment on column api_keys.created_by is 'By whom.';
comment on column api_keys.expires_at is 'From then on it is refused; null: never.';
comment on column api_keys.revoked_at is 'Since when it is refused; null: it is not.';
comment on column api_keys.revoked_by is 'By whom.';
comment on column api_keys.last_used_at is 'When it was last used, to within a few minutes; null: never.';

create table audit_log (
    id     bigint generated always as identity,
    at     timestamptz not null default now(),
    actor  text        not null,
    action text        not null,
    object text        not null,
    detail jsonb,

    constraint audit_log_pkey primary key (id),
    constraint audit_log_action_known check (action in (
        'workflow-put', 'workflow-deleted', 'workflow-paused', 'workflow-resumed', 'queue-paused', 'queue-resumed',
        'key-created', 'key-revoked'))
);
comment on table audit_log is 'What people and keys changed besides runs, whose changes are in run_events. Rows are added only, and kept for ever.';
comment on column audit_log.id is 'Grows; one that was rolled back is missing.';
comment on column audit_log.at is 'When, by the database''s clock.';
comment on column audit_log.actor is 'Who: a key''s name; without keys what the requester called itself, or its address; on the command line the database user.';
comment on column audit_log.action is 'What was done: workflow-put, workflow-deleted, workflow-paused, workflow-resumed, queue-paused, queue-resumed, key-created or key-revoked.';
comment on column audit_log.object is 'To what: a workflow id, a queue, the id of a key.';
comment on column audit_log.detail is 'What else there is to say, such as the revision; no secrets.';

create function refuse_to_forget() returns trigger language plpgsql set search_path from current as $$
begin
    raise exception 'rows of % are not %', tg_table_name, case tg_op when 'UPDATE' then 'changed' else 'deleted' end
        using errcode = 'restrict_violation',
              hint = case tg_table_name when 'api_keys' then 'Revoke the key: singletrack keys revoke, or update api_keys set revoked_at = now(), revoked_by = ...'
                                        else 'It says who did what: write another row.' end;
end $$;
comment on function refuse_to_forget() is 'Keeps rows of audit_log, and those of api_keys, which say that keys are asked for.';
create trigger audit_log_append_only before update or delete on audit_log for each row execute function refuse_to_forget();
create trigger audit_log_not_emptied before truncate on audit_log for each statement execute function refuse_to_forget();
create trigger api_keys_kept before delete on api_keys for each row execute function refuse_to_forget();
create trigger api_keys_not_emptied before truncate on api_keys for each statement execute function refuse_to_forget();
