//! Errors as `application/problem+json` (RFC 9457): a stable `type` per cause.

mod access;
mod answer;

use std::time::Duration;

use axum::http::StatusCode;
use chrono::Utc;
use serde::Serialize;
use uuid::Uuid;

use crate::domain::{Holder, Pause, Status, WorkflowId};
use crate::store;

use answer::RequestName;
pub(super) use answer::{answering, no_such_method, no_such_route, of_panic};

/// What `type` begins with; the cause follows.
const TYPE: &str = "urn:singletrack:problem:";

/// An answer that says what went wrong, for programs and for people.
#[derive(Debug, Serialize, utoipa::ToSchema)]
#[schema(example = json!({
    "type": "urn:singletrack:problem:slot-taken",
    "title": "Another run of this workflow is in progress",
    "status": 409,
    "run_id": "0198c5a0-5a1e-7c5e-9d3c-3f6d2a1b4c5d",
    "holder": {"status": "running", "reason": null, "created_at": "2026-11-22T10:00:00Z", "available_at": null,
               "started_at": "2026-11-22T10:00:01Z", "heartbeat_age_seconds": 3.2, "progress": {"percent": 40},
               "expected_end_at": "2026-11-22T10:05:00Z", "requested_by": "ci"}
}))]
pub(super) struct Problem {
    /// `urn:singletrack:problem:` and the cause, one of `slot-taken`, `workflow-paused`, `too-many-waiting`,
    /// `idempotency-key-reused`, `idempotency-in-flight`, `workflow-in-use`, `run-over`, `lease-lost`, `not-found`,
    /// `method-not-allowed`, `invalid-request`, `invalid-cursor`, `malformed-request`, `unsupported-media-type`, `too-large`,
    /// `not-authenticated`, `not-allowed`, `key-name-taken`, `too-many-requests`, `host-not-allowed`, `origin-not-allowed`,
    /// `too-many-listeners`, `too-many-batches`, `precondition-failed`, `not-acceptable`, `body-too-slow`, `contended`, `database-busy`,
    /// `database-unavailable`, `internal`. docs/problems.md says of each when it is given and what to do.
    #[serde(rename = "type", serialize_with = "as_type")]
    #[schema(value_type = String)]
    cause: &'static str,
    /// The cause in words; always the same for one `type`.
    title: &'static str,
    /// The HTTP status.
    #[serde(serialize_with = "as_number")]
    #[schema(value_type = u16)]
    status: StatusCode,
    /// What it is about this time, and what to do.
    #[serde(skip_serializing_if = "Option::is_none")]
    detail: Option<Box<str>>,
    /// What is wrong with which part of the request.
    #[serde(skip_serializing_if = "<[_]>::is_empty")]
    errors: Box<[Mistake]>,
    /// With `slot-taken` and `too-many-waiting`: the run that holds the slot. With `idempotency-key-reused`: what the other request
    /// became. With `workflow-in-use`: a run that is not over. With `run-over` and
    /// `lease-lost`: the run itself. With `database-unavailable`: the run that may have been enqueued all the same; ask for
    /// it, or repeat the request.
    #[serde(skip_serializing_if = "Option::is_none")]
    run_id: Option<Uuid>,
    /// With `slot-taken` and `too-many-waiting`: what the run that holds the slot is doing.
    #[serde(skip_serializing_if = "Option::is_none")]
    holder: Option<Box<Holder>>,
    /// With `workflow-paused`: who paused it, when and why.
    #[serde(skip_serializing_if = "Option::is_none")]
    pause: Option<Box<Pause>>,
    /// What the service's log and the header `X-Request-Id` call this request.
    #[serde(skip_serializing_if = "RequestName::is_unknown")]
    #[schema(value_type = Option<String>)]
    request_id: RequestName,
    /// In seconds.
    #[serde(skip)]
    retry_after: Option<u16>,
    /// What the log says and the client is not told.
    #[serde(skip)]
    for_the_log: Option<Box<str>>,
}

/// One wrong part of a request.
#[derive(Debug, Serialize, utoipa::ToSchema)]
pub(super) struct Mistake {
    /// Where it is in the body, as a JSON pointer; or the name of a parameter or header.
    #[serde(flatten)]
    pub(super) place: Place,
    /// What is wrong with it, and what would be right.
    pub(super) detail: String,
}

/// Where a mistake is.
#[derive(Debug, Serialize, utoipa::ToSchema)]
#[serde(rename_all = "snake_case")]
pub(super) enum Place {
    /// In the body.
    Pointer(String),
    /// In the path or the query.
    Parameter(String),
    /// In the headers.
    Header(String),
}

fn as_type<S: serde::Serializer>(cause: &str, out: S) -> Result<S::Ok, S::Error> {
    out.collect_str(&format_args!("{TYPE}{cause}"))
}

fn as_number<S: serde::Serializer>(status: &StatusCode, out: S) -> Result<S::Ok, S::Error> {
    out.serialize_u16(status.as_u16())
}

impl Problem {
    fn new(status: StatusCode, cause: &'static str, title: &'static str) -> Self {
        Self {
            cause,
            title,
            status,
            detail: None,
            errors: Box::default(),
            run_id: None,
            holder: None,
            pause: None,
            request_id: RequestName,
            retry_after: None,
            for_the_log: None,
        }
    }

    fn with_detail(self, detail: impl Into<Box<str>>) -> Self {
        Self { detail: Some(detail.into()), ..self }
    }

    pub(super) fn slot_taken(holder: Holder) -> Self {
        let detail = match holder.status.is_final() {
            true => "That one is over by now: ask again.",
            false => {
                "Ask again when it may be over, hold the answer until then with `Prefer: wait=N`, or say by `on_conflict` to wait for it, to join it, or to replace it."
            }
        };
        Self {
            detail: Some(detail.into()),
            run_id: Some(holder.run_id),
            retry_after: Some(retry_after(&holder)),
            holder: Some(Box::new(holder)),
            ..Self::new(StatusCode::CONFLICT, "slot-taken", "Another run of this workflow is in progress")
        }
    }

    pub(super) fn workflow_paused(pause: Pause) -> Self {
        let detail = format!("`{}` is paused: resume it, or enqueue with on_conflict `wait`.", pause.name);
        Self {
            pause: Some(Box::new(pause)),
            ..Self::new(StatusCode::CONFLICT, "workflow-paused", "The workflow is paused").with_detail(detail)
        }
    }

    pub(super) fn too_many_waiting(holder: Option<Holder>) -> Self {
        let detail = "As many runs as its `max_waiting` says wait for the slot already: nothing was enqueued.";
        Self {
            run_id: holder.as_ref().map(|holder| holder.run_id),
            retry_after: Some(holder.as_ref().map_or(RETRY, retry_after)),
            holder: holder.map(Box::new),
            ..Self::new(StatusCode::TOO_MANY_REQUESTS, "too-many-waiting", "Too many runs wait for this workflow")
                .with_detail(detail)
        }
    }

    pub(super) fn key_reused(run_id: Uuid) -> Self {
        Self {
            run_id: Some(run_id),
            ..Self::new(
                StatusCode::UNPROCESSABLE_ENTITY,
                "idempotency-key-reused",
                "The idempotency key was used for another request",
            )
            .with_detail("That request became `run_id`. Use another key for another request.")
        }
    }

    pub(super) fn key_in_flight() -> Self {
        Self {
            retry_after: Some(1),
            ..Self::new(
                StatusCode::CONFLICT,
                "idempotency-in-flight",
                "A request with the same idempotency key is under way",
            )
            .with_detail("Nothing was enqueued by this one. Repeat it for that one's answer.")
        }
    }

    pub(super) fn contended() -> Self {
        Self {
            retry_after: Some(1),
            ..Self::new(StatusCode::SERVICE_UNAVAILABLE, "contended", "The slot changed hands too fast to be looked at")
                .with_detail("Nothing was enqueued. Repeat the request.")
        }
    }

    pub(super) fn workflow_in_use(run_id: Uuid) -> Self {
        Self {
            run_id: Some(run_id),
            ..Self::new(StatusCode::CONFLICT, "workflow-in-use", "A run of this workflow is not over")
                .with_detail("Let it end, or cancel it, and delete the workflow then.")
        }
    }

    pub(super) fn not_found(what: &str) -> Self {
        Self::new(StatusCode::NOT_FOUND, "not-found", "There is no such thing").with_detail(what)
    }

    pub(super) fn no_run(id: Uuid) -> Self {
        Self::not_found(&format!("No run has the id {id}."))
    }

    pub(super) fn run_over(run_id: Uuid, status: Status) -> Self {
        Self {
            run_id: Some(run_id),
            ..Self::new(StatusCode::CONFLICT, "run-over", "The run is over")
                .with_detail(format!("It is {}: there is nothing left to cancel.", status.as_str()))
        }
    }

    pub(super) fn lease_lost(run_id: Uuid) -> Self {
        Self {
            run_id: Some(run_id),
            ..Self::new(StatusCode::CONFLICT, "lease-lost", "The lease is gone")
                .with_detail("The run is over, was given back, or is somebody else's by now: stop working on it.")
        }
    }

    pub(super) fn no_schedule(id: &WorkflowId) -> Self {
        Self::not_found(&format!(
            "Workflow `{id}` has no schedule. PUT /api/v1/workflows/{id} with `schedule` gives it one."
        ))
    }

    pub(super) fn no_workflow(id: &WorkflowId) -> Self {
        let base = id.definition();
        if base == id.as_str() {
            return Self::not_found(&format!("No workflow `{id}` is defined. PUT /api/v1/workflows/{id} defines it."));
        }
        Self::not_found(&format!(
            "`{id}` has no definition of its own: it runs with that of `{base}`, which PUT /api/v1/workflows/{base} makes."
        ))
    }

    pub(super) fn invalid(errors: Vec<Mistake>) -> Self {
        let detail = errors.iter().map(|mistake| format!("{}: {}", mistake.place.name(), mistake.detail));
        let detail = detail.collect::<Vec<_>>().join("; ");
        Self {
            errors: errors.into(),
            ..Self::new(
                StatusCode::UNPROCESSABLE_ENTITY,
                "invalid-request",
                "The request can't be carried out as it is",
            )
            .with_detail(detail)
        }
    }

    pub(super) fn invalid_at(place: Place, detail: impl Into<String>) -> Self {
        Self::invalid(vec![Mistake { place, detail: detail.into() }])
    }

    pub(super) fn precondition_failed() -> Self {
        Self::new(StatusCode::PRECONDITION_FAILED, "precondition-failed", "It is not as the request says")
            .with_detail("It was changed, made or deleted meanwhile: read it anew, and decide again.")
    }

    pub(super) fn invalid_cursor() -> Self {
        Self::new(StatusCode::BAD_REQUEST, "invalid-cursor", "The cursor is not one of this list")
            .with_detail("Use next_cursor of an answer to the same filters, or leave it out to begin anew.")
    }

    pub(super) fn malformed(detail: impl Into<Box<str>>) -> Self {
        Self::new(StatusCode::BAD_REQUEST, "malformed-request", "The request can't be read").with_detail(detail)
    }

    pub(super) fn not_json() -> Self {
        Self::new(StatusCode::UNSUPPORTED_MEDIA_TYPE, "unsupported-media-type", "The body must be JSON")
            .with_detail("Send the header Content-Type: application/json.")
    }

    pub(super) fn not_acceptable() -> Self {
        Self::new(StatusCode::NOT_ACCEPTABLE, "not-acceptable", "There is nothing of the kind that is asked for")
            .with_detail(
                "Answers are application/json, or text/event-stream where something is followed: accept one of them.",
            )
    }

    pub(super) fn body_too_slow(limit: Duration) -> Self {
        Self::new(StatusCode::REQUEST_TIMEOUT, "body-too-slow", "The body took too long to arrive").with_detail(
            format!("It has {} seconds; nothing was done. Send it faster, or fewer things at once.", limit.as_secs()),
        )
    }

    pub(super) fn too_large() -> Self {
        Self::new(StatusCode::PAYLOAD_TOO_LARGE, "too-large", "The body is too large").with_detail(format!(
            "At most {} bytes; to /leases/finish as many more as SINGLETRACK_OUTPUT_BYTES says. Send fewer things at once, or \
             store large ones elsewhere and hand over where they are.",
            super::BODY_LIMIT
        ))
    }

    pub(super) fn too_many_values(most: usize) -> Self {
        Self::too_large().with_detail(format!("At most {most} values in one body: send fewer things at once."))
    }

    pub(super) fn too_many_batches() -> Self {
        Self {
            retry_after: Some(RETRY),
            ..Self::new(StatusCode::SERVICE_UNAVAILABLE, "too-many-batches", "Too many batches are worked on here")
                .with_detail("Nothing was enqueued. Ask another replica, or repeat it after the time in Retry-After.")
        }
    }

    pub(super) fn too_many_listeners(most: usize) -> Self {
        Self {
            retry_after: Some(RETRY),
            ..Self::new(StatusCode::SERVICE_UNAVAILABLE, "too-many-listeners", "Too many clients follow something here")
                .with_detail(format!("This replica has {most} such streams open: ask another one, or later."))
        }
    }

    pub(super) fn internal(cause: impl Into<Box<str>>) -> Self {
        Self {
            for_the_log: Some(cause.into()),
            ..Self::new(StatusCode::INTERNAL_SERVER_ERROR, "internal", "The service failed")
                .with_detail("Its log has the cause, under the id in the header X-Request-Id.")
        }
    }

    /// The answer to an enqueue that failed.
    pub(super) fn of_enqueue(error: &store::Error, run_id: Uuid) -> Self {
        if !error.outcome_unknown() {
            return error.into();
        }
        let detail = "The run may have been enqueued all the same: ask for it by run_id, or repeat the request.";
        Self { run_id: Some(run_id), detail: Some(detail.into()), ..Self::unavailable(error) }
    }

    /// The answer to a claim whose outcome stayed unknown.
    pub(super) fn claim_unknown(error: &store::Error, has_id: bool) -> Self {
        let what_to_do = if has_id {
            "Repeat the request with the same claim_id: it gets what this one may have taken."
        } else {
            "What it may have taken is queued again after its heartbeat timeout. With a `claim_id` a repetition would get it."
        };
        Self { detail: Some(what_to_do.into()), ..Self::unavailable(error) }
    }

    /// The answer to those who waited for a look at the keys that failed; whoever looked has said why.
    pub(super) fn keys_unread() -> Self {
        Self { for_the_log: None, ..Self::unavailable(&store::Error::TimedOut) }
    }

    fn unavailable(error: &store::Error) -> Self {
        if let store::Error::Busy(_) = error {
            return Self {
                retry_after: Some(2),
                for_the_log: Some(error.to_string().into()),
                ..Self::new(StatusCode::SERVICE_UNAVAILABLE, "database-busy", "The database is too busy for this")
                    .with_detail(
                        "Somebody holds a lock that this needs, or the server has no room. Nothing was changed.",
                    )
            };
        }
        Self {
            retry_after: Some(2),
            for_the_log: Some(error.to_string().into()),
            ..Self::new(StatusCode::SERVICE_UNAVAILABLE, "database-unavailable", "The database can't be used right now")
                .with_detail("Repeat the request after the time in Retry-After.")
        }
    }

    /// The status it is answered with.
    pub(super) fn status(&self) -> StatusCode {
        self.status
    }

    /// Whether it is about who asks, and not about what was asked or what failed.
    pub(super) fn is_of_caller(&self) -> bool {
        self.status == StatusCode::UNAUTHORIZED
    }

    /// The run that holds the slot, where that is what the problem is; itself otherwise.
    pub(super) fn slot_holder(self) -> Result<Holder, Self> {
        match self.holder {
            Some(holder) if self.cause == "slot-taken" => Ok(*holder),
            holder => Err(Self { holder, ..self }),
        }
    }

    /// The cause, as in `type`.
    pub(super) fn cause(&self) -> &'static str {
        self.cause
    }

    /// The run it is about.
    pub(super) fn run_id(&self) -> Option<Uuid> {
        self.run_id
    }

    /// Logs what the client is not told. Once, at the edge: the layers below hand errors up and log nothing.
    pub(super) fn log(&self) {
        if let Some(cause) = &self.for_the_log {
            let status = self.status.as_u16();
            match self.cause {
                // Somebody has a lock: that may be as it should.
                "database-busy" => tracing::warn!(http.status = status, problem = self.cause, %cause, "request failed"),
                _ => tracing::error!(http.status = status, problem = self.cause, %cause, "request failed"),
            }
        }
    }

    /// What it is about, in a line.
    pub(super) fn line(&self) -> String {
        self.detail.as_deref().unwrap_or(self.title).to_owned()
    }
}

impl Place {
    fn name(&self) -> &str {
        match self {
            Self::Pointer(name) if name.is_empty() => "the body",
            Self::Pointer(name) | Self::Parameter(name) | Self::Header(name) => name,
        }
    }
}

impl From<&store::Error> for Problem {
    fn from(error: &store::Error) -> Self {
        if error.is_passing() {
            Self::unavailable(error)
        } else if error.is_bad_value() {
            Self::invalid(Vec::new()).with_detail("A value is out of the range that the database can hold.")
        } else {
            Self::internal(error.to_string())
        }
    }
}

impl From<store::Error> for Problem {
    fn from(error: store::Error) -> Self {
        Self::from(&error)
    }
}

/// Seconds after which it is worth asking again, where nothing better is known.
const RETRY: u16 = 5;

/// When it is worth asking again: when the holder may be over, but not in more than a minute.
fn retry_after(holder: &Holder) -> u16 {
    if holder.status.is_final() {
        return 0;
    }
    let Some(at) = holder.expected_end_at.or(holder.available_at) else { return RETRY };
    let seconds = (at - Utc::now()).num_seconds().clamp(0, 60) as u16;
    if seconds == 0 { RETRY } else { seconds }
}
