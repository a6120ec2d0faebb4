with violations as (
    select v.violation,
           v.workflow_id || coalesce(
               ' ' || v.run_id,
               -- of a whole workflow: the runs it is about
               (select ' ' || string_agg(r.id::text, ' ' order by r.id)
                from test_runs r
                where r.workflow_id = v.workflow_id
                  and r.status = any(case v.violation when 'two-running' then array['running'] else array['queued', 'running'] end)),
               '') || ': ' || v.detail as line
    from invariant_violations_since(case when $1::boolean then '-infinity' else now() - interval '24 hours' end) v
),
ranked as (
    select v.violation, v.line, row_number() over (partition by v.violation order by v.line) as place
    from violations v
)
select r.violation as "kind!",
       array_agg(r.line order by r.place) filter (where r.place <= $2::bigint) as "rows!",
       count(*) as "total!"
from ranked r
group by r.violation
order by r.violation
