-- What a statement does not name is taken from a setting of its transaction: enqueue_run_as keeps its arguments, which two versions of
-- the service call side by side, and people's SQL can say it too.
alter table test_runs
    alter column traceparent set default nullif(current_setting('singletrack.traceparent', true), '');
comment on column test_runs.traceparent is
    'W3C trace context of the enqueue. For enqueue_run: set_config(''singletrack.traceparent'', ..., true) in the same transaction.';
