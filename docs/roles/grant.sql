-- As singletrack_owner, after each `singletrack migrate`: what the others may. Again and again does no harm.

do $$
declare
    columns text;
    it      record;
begin
    -- The service reads and writes rows. It forgets no key, changes no entry of the audit log, and migrates nothing.
    grant select, insert, update, delete on all tables in schema public to singletrack_service;
    grant usage, select on all sequences in schema public to singletrack_service;
    revoke delete on api_keys from singletrack_service;
    revoke update, delete on audit_log from singletrack_service;
    revoke insert, update, delete on _sqlx_migrations from singletrack_service;

    -- People read history, and none of what would let them act in somebody's name: not the leases' secrets, not the names under
    -- which answers are given again, not the hashes of keys, not the definitions of commands and requests, which may hold passwords.
    for it in
        select c.oid, c.relname, c.relkind
        from pg_class c
        where c.relnamespace = 'public'::regnamespace and c.relkind in ('r', 'p', 'v')
          and c.relname not in ('_sqlx_migrations', 'idempotency_keys')
    loop
        select string_agg(quote_ident(a.attname), ', ')
        into columns
        from pg_attribute a
        where a.attrelid = it.oid and a.attnum > 0 and not a.attisdropped
          and (it.relname, a.attname) not in (
              ('test_runs', 'lease_secret'), ('test_runs', 'claim_id'), ('api_keys', 'secret_hash'),
              ('workflow_revisions', 'executor'));
        execute format('grant select (%s) on %I to singletrack_reader', columns, it.relname);
    end loop;
end $$;
