//! What is said of broken promises, of leases and of slots.

use sqlx::postgres::PgConnection;

use super::{Checks, Finding, Judged};
use crate::store::doctor::promise::{self as facts, Fences, Worker, Wrong};

/// One way in which rows can be wrong.
struct Kind {
    name: &'static str,
    /// What is so where there are none.
    holds: &'static str,
    /// What they are, after their number.
    what: &'static str,
    means: &'static str,
    remedy: &'static str,
}

/// What the database says of itself. Where the promise was broken no statement can make it unbroken: what is left is to stop what
/// should not run, and to find out who did it.
const VIOLATIONS: &[Kind] = &[
    Kind {
        name: "two-running",
        holds: "no workflow has two running runs",
        what: "workflows with more than one running run",
        means: "The promise is broken: the unique index test_runs_one_running is missing or damaged, or was when they were started. \
                Their processes may be running beside each other.",
        remedy: "Decide which run is to go on, and end the others: select force_release_run('RUN', 'doubled'); and stop their processes. \
                 Then restore the index, as the check `indexes` says, or reindex index concurrently test_runs_one_running;",
    },
    Kind {
        name: "two-slots",
        holds: "no workflow has two runs in its slot",
        what: "workflows with more than one queued or running run",
        means: "The promise is broken: the unique index test_runs_one_slot is missing or damaged, or was when they were enqueued.",
        remedy: "End all but one of them: select cancel_run('RUN'); or, of a running one, force_release_run('RUN', 'doubled'). Then restore \
                 the index, as the check `indexes` says, or reindex index concurrently test_runs_one_slot;",
    },
    Kind {
        name: "overlapping-attempts",
        holds: "no attempt of a workflow started before the one before it was settled",
        what: "attempts that started while another of their workflow was not settled",
        means: "Two attempts held one slot at once: their work may have been done side by side.",
        remedy: "select * from run_events where run_id = 'RUN' order by seq; says who wrote it. If it was no superuser, it is a bug: report it \
                 with those rows.",
    },
    Kind {
        name: "fence-went-back",
        holds: "the fences of a workflow only grow",
        what: "claims whose fence is not larger than that of the claim before",
        means: "What checks SINGLETRACK_FENCE could not tell the new attempt from the old one. A failover to an asynchronous standby, or a \
                restore, does this.",
        remedy: "See the check `fences`. Let whatever keeps the last fence forget it, for these workflows, once no old attempt can be alive.",
    },
    Kind {
        name: "final-twice",
        holds: "every run became final once",
        what: "runs that became final more than once",
        means: "Somebody may have been told of an end that was not the last word.",
        remedy: "select * from run_events where run_id = 'RUN' order by seq; says who wrote it. If it was no superuser, it is a bug: report it \
                 with those rows.",
    },
    Kind {
        name: "changed-after-final",
        holds: "nothing happened to a run after its end",
        what: "status changes of runs that were final",
        means: "A final run was changed: whoever read its end before read something else.",
        remedy: "select * from run_events where run_id = 'RUN' order by seq; says who wrote it. If it was no superuser, it is a bug: report it \
                 with those rows.",
    },
    Kind {
        name: "status-without-event",
        holds: "every run is what its last event says",
        what: "runs whose status is not what their last event says",
        means: "A row was changed past the triggers (session_replication_role, a disabled trigger, a restore of part of the tables): the log \
                of status changes has a gap there.",
        remedy: "insert into run_events (run_id, to_status, attempt, fence, actor, reason) select id, status, attempt, fence, 'doctor', \
                 'repaired' from test_runs where id = 'RUN'; and see the checks `triggers` and `overrides`.",
    },
    Kind {
        name: "final-without-attempt",
        holds: "every run that was executed has its attempt",
        what: "runs that ended without a row of their last attempt",
        means: "Who ran it last, and under which fence it was settled, is not recorded.",
        remedy: "If rows of run_attempts were deleted or not restored, bring them back from a backup. Else it is a bug: report it.",
    },
    Kind {
        name: "lease-overdue",
        holds: "no lease is past its deadline",
        what: "running runs whose lease ended more than a minute ago",
        means: "No reaper ended them: no replica reaches this database, or their rows are locked. Their slots stay taken.",
        remedy: "Start a replica: singletrack serve. Where one runs, see the check `idle-locks`. To free a slot at once although its process \
                 may still run: select force_release_run('RUN', 'reason');",
    },
    Kind {
        name: "stranded-waiter",
        holds: "no run waits behind a free slot",
        what: "runs that wait for a slot that is free",
        means: "Nobody starts them: the trigger test_runs_hand_on_slot did not fire, and no replica sweeps.",
        remedy: "select promote_if_free('WORKFLOW'); queues the next one. Then see the check `triggers`, and that a replica runs.",
    },
    Kind {
        name: "due-and-scheduled",
        holds: "no scheduled run is overdue",
        what: "scheduled runs that were due more than a minute ago",
        means: "Nobody starts what is due: no replica reaches this database, or the rows are locked.",
        remedy: "Start a replica: singletrack serve. By hand: select start_due('RUN');",
    },
];

/// The slots once more, from the rows themselves.
const DOUBLED: Kind = Kind {
    name: "doubled-slots",
    holds: "the rows say so too, read without an index",
    what: "workflows with more than one queued or running run, by the rows themselves",
    means: "The promise is broken. If the check `two-slots` found nothing, an index is damaged and hides it.",
    remedy: "End all but one of them: select force_release_run('RUN', 'doubled'); then reindex table concurrently test_runs;",
};

const LEASES: &[Kind] = &[
    Kind {
        name: "orphan-lease",
        holds: "every lease is of a run that has one",
        what: "leases without a run that could hold one",
        means: "No reaper has removed them: no replica reaches this database, or somebody writes to run_leases by hand.",
        remedy: "Start a replica: singletrack serve; it removes them. By hand: delete from run_leases where run_id = 'RUN';",
    },
    Kind {
        name: "foreign-lease",
        holds: "every lease is of its run's own claim",
        what: "running runs whose lease was given to a claim that they do not have",
        means: "Their workers are told that they lost the lease, and stop; the slots stay taken until the heartbeat timeout.",
        remedy: "Nothing: a reaper ends them then. Somebody wrote to run_leases by hand, or restored a part of the tables.",
    },
    Kind {
        name: "past-time-limit",
        holds: "no run is past its time limit",
        what: "running runs that their workers renew long after their time limit",
        means: "Their worker can't end them, and no reaper did.",
        remedy: "Start a replica: singletrack serve; its reaper ends them as timed_out, reason unkillable. See the check `idle-locks`.",
    },
    Kind {
        name: "lost-worker",
        holds: "every running run has a worker that is there",
        what: "running runs held by a worker that is gone",
        means: "Nobody works on them; a reaper ends them as stale when the lease is over. Until then their slots are taken.",
        remedy: "Wait for it. Where the worker's machine is known to be dead: select force_release_run('RUN', 'reason'); frees the slot at once.",
    },
];

const SLOTS: &[Kind] = &[
    Kind {
        name: "no-worker",
        holds: "every slot that is due is served",
        what: "queued runs that no worker serves",
        means: "Nobody who takes their kind and their queue was seen for a minute. They hold their slots until start_within_seconds is over.",
        remedy: "Start a worker for that queue and executor (SINGLETRACK_QUEUES, SINGLETRACK_WORKERS; a pull worker; a program with that \
                 handler), or give the slot up: select cancel_run('RUN');",
    },
    Kind {
        name: "paused-for-long",
        holds: "no pause is forgotten",
        what: "pauses of more than a day that runs wait for",
        means: "What waits does not start until somebody resumes.",
        remedy: "POST /api/v1/workflows/NAME/resume, or /api/v1/queues/NAME/resume; or cancel what waits.",
    },
];

/// Makes the checks.
pub(super) async fn look(connection: &mut PgConnection, checks: &mut Checks, full: bool) -> sqlx::Result<()> {
    let found = facts::violations(connection, full).await;
    add_kinds(checks, VIOLATIONS, found)?;
    let found = facts::doubled_slots(connection).await;
    add_kinds(checks, &[DOUBLED], found)?;
    let fences = facts::fences(connection).await.map(fences);
    checks.add("fences", "the next fence is larger than all before", fences)?;
    let found = facts::leases(connection).await;
    add_kinds(checks, LEASES, found)?;
    let found = facts::slots(connection).await;
    add_kinds(checks, SLOTS, found)?;
    let workers = facts::workers(connection).await.map(|workers| replicas(&workers));
    checks.add("replicas", "who asks for runs", workers)
}

/// Adds a check for each of `kinds`, and one for whatever else the database found.
fn add_kinds(checks: &mut Checks, kinds: &'static [Kind], found: sqlx::Result<Vec<Wrong>>) -> sqlx::Result<()> {
    let found = match found {
        Ok(found) => Ok(found),
        Err(error) => Err(checks.why_unseen(error)?),
    };
    for kind in kinds {
        let judged = found.as_ref().map_err(Clone::clone).map(|found| {
            let wrong = found.iter().find(|wrong| wrong.kind == kind.name);
            Judged::from(wrong.map(|wrong| finding(kind, wrong)).into_iter().collect::<Vec<_>>())
        });
        checks.push(kind.name, kind.holds, judged);
    }
    // A newer schema may know more ways.
    let known = |wrong: &&Wrong| kinds.iter().any(|kind| kind.name == wrong.kind);
    let others: Vec<Finding> = found
        .iter()
        .flatten()
        .filter(|wrong| !known(wrong))
        .map(|wrong| {
            Finding::new(
                wrong.kind.clone(),
                "A promise is broken that this version does not know.",
                "Ask the newer version's doctor.",
            )
            .about(wrong.rows.clone(), wrong.total)
        })
        .collect();
    if !others.is_empty() {
        checks.push("other-violations", "nothing else is wrong", Ok(others.into()));
    }
    Ok(())
}

fn finding(kind: &Kind, wrong: &Wrong) -> Finding {
    Finding::new(format!("{} {}", wrong.total, kind.what), kind.means, kind.remedy)
        .about(wrong.rows.clone(), wrong.total)
}

/// Judges the sequence that fences come from.
fn fences(fences: Fences) -> Judged {
    let mut judged = Judged::default();
    let given = fences.given.unwrap_or(0);
    if !fences.readable {
        judged
            .notes
            .push("the sequence run_fence may not be read by this account: grant select on sequence run_fence".into());
    } else if given < fences.largest {
        let largest = fences.largest;
        judged.findings.push(Finding::new(
            format!("the sequence run_fence is at {given}, and fence {largest} is in use"),
            "The next claims get fences that were given before: they fail, or can't be told from old ones. A failover to an asynchronous \
             standby, or a restore, does this.",
            format!("select setval('run_fence', {largest});"),
        ));
    }
    judged
}

/// Says who is there. That nobody is, is wrong only where something waits, and then found there.
fn replicas(workers: &[Worker]) -> Judged {
    let (here, silent): (Vec<&Worker>, Vec<&Worker>) = workers.iter().partition(|worker| worker.silent_seconds <= 60);
    let replicas = here.iter().filter(|worker| worker.is_replica).count();
    let mut notes = vec![format!("{replicas} replicas that execute runs, {} pull workers", here.len() - replicas)];
    let mut versions: Vec<&str> = here
        .iter()
        .filter(|worker| worker.is_replica)
        .map(|worker| worker.version.as_deref().unwrap_or("an older one"))
        .collect();
    versions.sort_unstable();
    versions.dedup();
    if versions.len() > 1 {
        notes.push(format!("of different versions: {}", versions.join(", ")));
    }
    for worker in silent.iter().take(10) {
        notes.push(format!("{} was last seen {} s ago", worker.name, worker.silent_seconds));
    }
    if silent.len() > 10 {
        notes.push(format!("and {} more", silent.len() - 10));
    }
    Judged { findings: Vec::new(), notes }
}
