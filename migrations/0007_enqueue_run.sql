-- Enqueueing, for the API where one statement over many is not enough, and for people in their own transactions.

create function new_run_id() returns uuid language sql volatile set search_path from current as $$
    -- a random one, with the time in milliseconds in front, and its version changed from 4 to 7 (RFC 9562)
    select encode(set_bit(set_bit(overlay(
        uuid_send(gen_random_uuid())
        placing substring(int8send((extract(epoch from clock_timestamp()) * 1000)::bigint) from 3)
        from 1 for 6), 52, 1), 53, 1), 'hex')::uuid
$$;
comment on function new_run_id() is 'A UUIDv7.';

create function enqueue_run_as(
    id uuid, workflow_id text, input jsonb, on_conflict text, idempotency_key text, priority integer, run_at timestamptz,
    delay_seconds double precision, labels jsonb, max_attempts integer, rerun_of uuid, tick_at timestamptz, requested_by text,
    owner text, key_seconds double precision, repeated boolean,
    out run_id uuid, out outcome text, out holder uuid)
language plpgsql set search_path from current as $$
#variable_conflict use_variable
declare
    known    record;
    kept     idempotency_keys;
    print    bytea;
    met      record;
    is_known boolean;
    refused  text;
    replaces boolean := false;
    due_at   constant timestamptz := coalesce(tick_at, run_at, now() + make_interval(secs => delay_seconds));
    inserted integer;
begin
    select w.id as definition, v.revision, v.executor_type, v.queue, v.timeout_seconds, v.heartbeat_timeout_seconds, v.max_waiting,
           coalesce(enqueue_run_as.on_conflict, v.on_conflict) as on_conflict,
           coalesce(input, o.input) as input,
           coalesce(priority::smallint, o.priority, v.priority) as priority,
           coalesce(o.labels, v.labels) || coalesce(labels, '{}') as labels,
           coalesce(max_attempts, o.max_attempts, v.max_attempts) as max_attempts
    into known
    from (select) one
    left join test_runs o on o.id = rerun_of
    cross join lateral (
        select w.id, w.revision
        from workflows w
        where w.id = any(case when o.id is null then array[workflow_id, split_part(workflow_id, '@', 1)] else array[o.definition] end)
          and w.deleted_at is null
        order by length(w.id) desc
        limit 1
    ) w
    join workflow_revisions v on v.workflow_id = w.id and v.revision = coalesce(o.revision, w.revision)
    where rerun_of is null or o.id is not null;
    is_known := found;

    if idempotency_key is not null then
        -- The time as a number: as a text it would be another one in each session's time zone.
        print := sha256(convert_to(jsonb_build_array(input, enqueue_run_as.on_conflict, priority, extract(epoch from run_at), delay_seconds,
                                                     coalesce(labels, '{}'), max_attempts, rerun_of)::text, 'UTF8'));
        -- A refusal is to write nothing, not even its key. Looked at before the key: whoever took the slot under this very key has
        -- committed that one too.
        if is_known and known.on_conflict = 'reject' and (due_at <= now()) is not false and tick_at is null then
            select * into met from meet_slot(workflow_id, known.definition, 'reject', known.max_waiting);
            refused := nullif(met.verdict, 'free');
        end if;
        loop
            select * into kept from idempotency_keys k
            where k.owner = enqueue_run_as.owner and k.workflow_id = enqueue_run_as.workflow_id and k.key = idempotency_key;
            if found and kept.expires_at > now() and exists (select from test_runs r where r.id = kept.run_id) then
                run_id := kept.run_id;
                outcome := case when kept.fingerprint <> print then 'idempotency-mismatch'
                                when kept.joined then 'existing' else 'repeated' end;
                return;
            elsif found then
                delete from idempotency_keys k
                where k.owner = kept.owner and k.workflow_id = kept.workflow_id and k.key = kept.key and k.run_id = kept.run_id;
            end if;
            exit when not is_known or refused is not null;
            begin
                insert into idempotency_keys as k (owner, workflow_id, key, fingerprint, run_id, expires_at)
                values (owner, workflow_id, idempotency_key, print, id, now() + make_interval(secs => key_seconds))
                on conflict do nothing; -- waits for the same request that is under way
                get diagnostics inserted = row_count;
            exception when lock_not_available then
                outcome := 'idempotency-in-flight';
                return;
            end;
            exit when inserted = 1;
        end loop;
    end if;
    if not is_known then
        outcome := 'not-found';
        return;
    elsif refused is not null then
        outcome := refused;
        holder := met.holder;
        return;
    end if;

    for look in 1..8 loop
        -- The same request, sent before: looked for only when it may be there.
        if repeated or look > 1 then
            perform from test_runs r where r.id = enqueue_run_as.id;
            if found then
                run_id := id;
                outcome := 'repeated';
                return;
            end if;
        end if;
        if due_at > now() or tick_at is not null then
            outcome := 'scheduled';
        else
            select * into met from meet_slot(workflow_id, known.definition, known.on_conflict, known.max_waiting);
            holder := met.holder;
            replaces := met.verdict = 'replace';
            outcome := case met.verdict when 'free' then 'queued' when 'replace' then 'waiting' else met.verdict end;
        end if;
        exit when outcome not in ('scheduled', 'waiting', 'queued');
        insert into test_runs (id, workflow_id, definition, revision, status, executor_type, queue, priority, labels, input,
                               on_conflict, run_at, tick_at, available_at, timeout_seconds, heartbeat_timeout_seconds,
                               requested_by, max_attempts, rerun_of, next_in_line, version)
        values (id, workflow_id, known.definition, known.revision, outcome, known.executor_type, known.queue, known.priority,
                known.labels, known.input, known.on_conflict, due_at, tick_at, case when outcome = 'queued' then now() end,
                known.timeout_seconds, known.heartbeat_timeout_seconds, requested_by, known.max_attempts, rerun_of,
                replaces, 1)
        on conflict do nothing; -- whatever index it is: REINDEX CONCURRENTLY brings one of another name
        get diagnostics inserted = row_count;
        if inserted = 1 then
            run_id := id;
            insert into run_events (run_id, from_status, to_status, attempt, fence, actor)
            values (id, null, outcome, 0, 0, requested_by);
            if tick_at is not null then
                outcome := coalesce(start_due(id), outcome);
            elsif replaces then
                perform replace_holder(id, workflow_id, holder, requested_by);
                select r.status into outcome from test_runs r where r.id = enqueue_run_as.id;
            end if;
            return;
        end if;
        outcome := 'contended';
    end loop;

    if outcome = 'existing' then
        run_id := holder;
    end if;
    if idempotency_key is not null then
        if outcome = 'existing' then
            update idempotency_keys k set run_id = enqueue_run_as.holder, joined = true
            where k.owner = enqueue_run_as.owner and k.workflow_id = enqueue_run_as.workflow_id and k.key = idempotency_key;
        else -- refusals are not kept
            delete from idempotency_keys k
            where k.owner = enqueue_run_as.owner and k.workflow_id = enqueue_run_as.workflow_id and k.key = idempotency_key;
        end if;
    end if;
end $$;
comment on function enqueue_run_as(uuid, text, jsonb, text, text, integer, timestamptz, double precision, jsonb, integer, uuid, timestamptz, text, text, double precision, boolean) is
    'Enqueues a run in the name of requested_by; what the API calls where one statement over many is not enough. People call enqueue_run.';

create function enqueue_run(
    workflow_id text, input jsonb default null, on_conflict text default null, idempotency_key text default null,
    priority integer default null, run_at timestamptz default null, labels jsonb default null, max_attempts integer default null,
    out run_id uuid, out outcome text, out holder uuid)
language plpgsql set search_path from current set lock_timeout = '2s' as $$
#variable_conflict use_variable
declare
    wrong constant text := case
        when coalesce(workflow_id, '') !~ '^[A-Za-z0-9][A-Za-z0-9._-]{0,127}(@[A-Za-z0-9][A-Za-z0-9._-]{0,63})?$'
            then 'workflow_id: ' || coalesce(quote_literal(workflow_id), 'null') || ' is not a workflow id such as deploy or deploy@prod'
        when on_conflict not in ('reject', 'return_existing', 'wait', 'replace')
            then 'on_conflict: ' || quote_literal(on_conflict) || ' is not one of reject, return_existing, wait, replace'
        when length(idempotency_key) not between 1 and 255 then 'idempotency_key: must have 1 to 255 characters'
        when priority not between -100 and 100 then 'priority: ' || priority || ' is out of range: -100 to 100, higher first'
        when run_at < '1970-01-01 00:00:00+00' or run_at >= '10000-01-01 00:00:00+00' then 'run_at: must be in the years 1970 to 9999'
        when max_attempts not between 1 and 1000 then 'max_attempts: ' || max_attempts || ' is out of range: 1 to 1000'
        when jsonb_typeof(labels) <> 'object' or jsonb_path_exists(labels, '$.* ? (@.type() != "string")')
            then 'labels: must be an object of strings'
        when (select count(*) > 64 or bool_or(octet_length(l.key) not between 1 and 63 or octet_length(l.value) > 255)
              from jsonb_each_text(case jsonb_typeof(labels) when 'object' then labels end) l)
            then 'labels: at most 64, names of 1 to 63 bytes, values of at most 255 bytes'
    end;
begin
    if current_setting('transaction_isolation') <> 'read committed' then
        raise exception 'enqueue_run needs a READ COMMITTED transaction, this one is %', upper(current_setting('transaction_isolation'))
            using errcode = 'feature_not_supported',
                  hint = 'It must see who took the slot meanwhile, which a snapshot from before does not show. Begin with: begin isolation level read committed.';
    elsif wrong is not null then
        raise exception '%', wrong using errcode = 'invalid_parameter_value', hint = 'See the comment of enqueue_run.';
    end if;
    select e.run_id, e.outcome, e.holder into run_id, outcome, holder
    from enqueue_run_as(new_run_id(), workflow_id, input, on_conflict, idempotency_key, priority, run_at, null, labels, max_attempts,
                        null, null, session_user, '', 86400, false) e;
    if outcome = 'repeated' then
        select r.status into outcome from test_runs r where r.id = enqueue_run.run_id;
    elsif outcome = 'idempotency-mismatch' then
        raise exception 'idempotency_key % was used for another request, which became run %', quote_literal(idempotency_key), run_id
            using errcode = 'invalid_parameter_value', hint = 'Use another key for another request.';
    elsif outcome in ('idempotency-in-flight', 'contended') then
        raise exception '%', case outcome when 'contended' then 'the slot changed hands too fast to be looked at'
                                  else 'a request with this idempotency_key is under way' end
            using errcode = 'lock_not_available', hint = 'Nothing was enqueued. Try again.';
    end if;
end $$;
comment on function enqueue_run(text, jsonb, text, text, integer, timestamptz, jsonb, integer) is
    'Enqueues a run in this transaction, which must be READ COMMITTED. Everything but the first argument may be null: as the workflow '
    'says. outcome: queued, scheduled or waiting (run_id is the new run; with a repeated idempotency_key the run that it became, and its '
    'status), existing (run_id is the run that has the slot), and, with nothing enqueued: slot-taken (holder is the run that has it), '
    'workflow-paused, too-many-waiting, not-found. Until the transaction ends, other requests for the same workflow have to wait.';
