//! Where an answer leads: what a client calls next, and where it takes the parameter from.

use utoipa::openapi::link::LinkBuilder;
use utoipa::openapi::path::Operation;
use utoipa::openapi::{OpenApi, RefOr};

use super::operations;

/// An answer of an operation, what can be called after it, and what of it that one's path names.
struct Link {
    after: &'static str,
    status: &'static str,
    next: &'static [&'static str],
    parameter: &'static str,
    from: &'static str,
}

/// What is asked about a run.
const ABOUT_A_RUN: &[&str] =
    &["get_run", "list_attempts", "list_events", "read_log", "list_refusals", "cancel_run", "rerun_run"];
/// What is asked about a workflow.
const ABOUT_A_WORKFLOW: &[&str] =
    &["get_workflow", "list_revisions", "enqueue_run", "pause_workflow", "resume_workflow", "delete_workflow"];

const fn link(
    after: &'static str,
    status: &'static str,
    next: &'static [&'static str],
    parameter: &'static str,
    from: &'static str,
) -> Link {
    Link { after, status, next, parameter, from }
}

const LINKS: &[Link] = &[
    link("enqueue_run", "202", ABOUT_A_RUN, "id", "$response.body#/id"),
    // Who has the slot.
    link("enqueue_run", "409", &["get_run", "cancel_run", "read_log"], "id", "$response.body#/run_id"),
    link("enqueue_run", "200", &["get_run"], "id", "$response.body#/id"),
    link("rerun_run", "202", ABOUT_A_RUN, "id", "$response.body#/id"),
    link("list_runs", "200", &["list_runs"], "cursor", "$response.body#/next_cursor"),
    link("put_workflow", "200", ABOUT_A_WORKFLOW, "id", "$request.path.id"),
    link("put_workflow", "201", ABOUT_A_WORKFLOW, "id", "$request.path.id"),
    link("put_workflow", "201", &["next_ticks"], "workflow_id", "$request.path.id"),
    link("start_test_run", "202", &["get_script_run"], "id", "$response.body#/scriptRunId"),
    link("create_key", "201", &["revoke_key"], "id", "$response.body#/id"),
];

/// Writes the links into the answers of the document.
pub(super) fn add(document: &mut OpenApi) {
    for item in document.paths.paths.values_mut() {
        for operation in operations(item) {
            of(operation);
        }
    }
}

fn of(operation: &mut Operation) {
    let Some(id) = operation.operation_id.clone() else { return };
    for link in LINKS.iter().filter(|link| link.after == id) {
        let Some(RefOr::T(response)) = operation.responses.responses.get_mut(link.status) else { continue };
        for next in link.next {
            let made = LinkBuilder::new().operation_id(*next).parameter(link.parameter, link.from).build();
            response.links.insert((*next).into(), made.into());
        }
    }
}
