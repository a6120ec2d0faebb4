//! The OpenAPI document.

mod links;

use std::collections::BTreeMap;
use std::sync::LazyLock;

use axum::body::Bytes;
use axum::http::header;
use axum::response::IntoResponse;
use utoipa::PartialSchema as _;
use utoipa::openapi::header::{Header, HeaderBuilder};
use utoipa::openapi::path::{Operation, ParameterIn};
use utoipa::openapi::response::ResponseBuilder;
use utoipa::openapi::schema::Schema;
use utoipa::openapi::security::{HttpAuthScheme, HttpBuilder, SecurityScheme};
use utoipa::openapi::{Content, ContentBuilder, OpenApi, PathItem, Ref, RefOr, Response};

const PROBLEM_JSON: &str = "application/problem+json";
/// What any request can meet before its handler.
const NOT_OURS: &str = "`host-not-allowed`, `origin-not-allowed`: not the service's own.";
/// The form of a workflow's id, and of a queue's name, as regular expressions of JSON Schema; `domain/workflow.rs` checks it.
const WORKFLOW_ID: &str = "^[A-Za-z0-9][A-Za-z0-9._-]{0,127}(@[A-Za-z0-9][A-Za-z0-9._-]{0,63})?$";
const QUEUE: &str = "^[A-Za-z0-9][A-Za-z0-9._-]{0,127}$";

/// The document of every route.
pub fn document() -> OpenApi {
    let mut document = super::routes(0).split_for_parts().1;
    document.info.title = "Singletrack".into();
    document.info.version = env!("CARGO_PKG_VERSION").into();
    document.info.description = Some(
        "Runs each workflow at most once at a time. Errors are `application/problem+json` (RFC 9457) with a stable `type`; \
         times are RFC 3339 in UTC. As soon as a key was made, and wherever others can reach it, the service asks \
         for one; the scope that a key needs is named under `api_key`, and `admin` has all of them."
            .into(),
    );
    let mut bearer = HttpBuilder::new().scheme(HttpAuthScheme::Bearer).build();
    bearer.description =
        Some("A key, `st_<id>_<secret>`: `singletrack keys create` makes one, or POST /api/v1/keys.".into());
    document.components.get_or_insert_default().add_security_scheme("api_key", SecurityScheme::Http(bearer));
    document.components.get_or_insert_default().headers.extend(headers());
    for (path, item) in &mut document.paths.paths {
        for operation in operations(item) {
            complete(operation);
            let is_guarded = operation.security.as_deref().unwrap_or_default().len() > 1;
            let takes_body = operation.request_body.is_some();
            refuse(&mut operation.responses.responses, path, is_guarded, takes_body);
            if path.starts_with("/api/v1/workflows/") || path.starts_with("/api/v1/schedules/") {
                form_of_the_name(operation, WORKFLOW_ID);
            } else if path.starts_with("/api/v1/queues/") {
                form_of_the_name(operation, QUEUE);
            }
            name_headers(&mut operation.responses.responses);
        }
    }
    links::add(&mut document);
    document
}

type Responses = BTreeMap<String, RefOr<Response>>;

/// The answers that no handler gives: those of what stands before all of them, and of a failure inside.
fn refuse(responses: &mut Responses, path: &str, is_guarded: bool, takes_body: bool) {
    let has_body = takes_body || responses.contains_key("415");
    let mut add = |status: &str, meaning: &str| {
        responses.entry(status.into()).or_insert_with(|| problem(meaning));
    };
    add("500", "`internal`: it failed, and the service's log has the cause.");
    if path.starts_with("/api/") {
        add("406", "`not-acceptable`: `Accept` asks for nothing that there is.");
        if is_guarded {
            add("503", meaning("503"));
        }
    }
    if path.starts_with("/api/v1/") {
        if has_body {
            add("408", "`body-too-slow`: it did not arrive within a minute.");
        }
        add("422", meaning("422"));
    }
    if !is_guarded {
        return add("403", NOT_OURS);
    }
    add("401", "`not-authenticated`: there is no key, or no good one.");
    add("429", "`too-many-requests`: the key is over its rate.");
    let scope = "`not-allowed`: the key does not have the scope, or is bound to other workflows.";
    add("403", &format!("{scope} {NOT_OURS}"));
    add("503", meaning("503"));
}

/// What a header of an answer means.
const HEADERS: [(&str, &str); 3] = [
    (
        "X-Request-Id",
        "What the service's log calls the request; the request's own, where it had one of 1 to 128 visible ASCII characters",
    ),
    ("Retry-After", "Seconds"),
    ("WWW-Authenticate", "`Bearer`"),
];

fn headers() -> impl Iterator<Item = (String, RefOr<Header>)> {
    HEADERS.into_iter().map(|(name, meaning)| {
        let schema = if name == "Retry-After" { u64::schema() } else { String::schema() };
        (name.to_owned(), HeaderBuilder::new().schema(Some(schema)).description(Some(meaning)).build().into())
    })
}

/// Names the headers that are the same for all answers of a status.
fn name_headers(responses: &mut Responses) {
    for (status, response) in responses {
        let RefOr::T(response) = response else { continue };
        let is_problem = response.content.contains_key(PROBLEM_JSON);
        for (name, _) in HEADERS {
            let has = match name {
                "Retry-After" => status == "429" || (status == "503" && is_problem),
                "WWW-Authenticate" => status == "401",
                _ => true,
            };
            if has {
                let reference = Ref::new(format!("#/components/headers/{name}"));
                response.headers.entry(name.into()).or_insert(RefOr::Ref(reference));
            }
        }
    }
}

/// Says what the name in the path looks like.
fn form_of_the_name(operation: &mut Operation, pattern: &str) {
    let parameters = operation.parameters.iter_mut().flatten();
    for parameter in parameters.filter_map(|parameter| match parameter {
        RefOr::T(parameter) if parameter.parameter_in == ParameterIn::Path => Some(parameter),
        _ => None,
    }) {
        if let Some(RefOr::T(Schema::Object(schema))) = &mut parameter.schema {
            schema.pattern = Some(pattern.into());
        }
    }
}

pub(super) fn operations(item: &mut PathItem) -> impl Iterator<Item = &mut Operation> {
    [&mut item.get, &mut item.put, &mut item.post, &mut item.delete].into_iter().flatten()
}

/// What an answer means whose route says nothing more about it.
fn meaning(status: &str) -> &'static str {
    match status {
        "200" => "As asked",
        "201" => "Made",
        "202" => "Accepted, and committed before this answer",
        "204" => "Done",
        "400" => {
            "`malformed-request`: it can't be read. `invalid-cursor`: the cursor is of another list, or was changed."
        }
        "404" => "`not-found`",
        "412" => "`precondition-failed`: it is not as `If-Match` or `If-None-Match` says.",
        "413" => "`too-large`",
        "415" => "`unsupported-media-type`: the body must be JSON, and the header Content-Type say so.",
        "422" => "`invalid-request`: `errors` names each wrong part.",
        "503" => "`database-unavailable`, `database-busy` or `contended`: repeat it after the time in `Retry-After`.",
        _ => "",
    }
}

fn problem(meaning: &str) -> RefOr<Response> {
    let content = ContentBuilder::new().schema(Some(Ref::from_schema_name("Problem"))).build();
    ResponseBuilder::new().description(meaning).content(PROBLEM_JSON, content).build().into()
}

/// The routes' declarations say what the bodies are, and not what is the same for all: under which media type problems are
/// sent, and what a status means.
fn complete(operation: &mut Operation) {
    for (status, response) in &mut operation.responses.responses {
        let RefOr::T(response) = response else { continue };
        if response.description.is_empty() {
            response.description = meaning(status).into();
        }
        let is_problem = |content: &RefOr<Content>| {
            let RefOr::T(content) = content else { return false };
            matches!(&content.schema, Some(RefOr::Ref(schema)) if schema.ref_location.ends_with("/Problem"))
        };
        if response.content.get("application/json").is_some_and(is_problem)
            && let Some(content) = response.content.shift_remove("application/json")
        {
            response.content.insert(PROBLEM_JSON.into(), content);
        }
    }
}

/// This document
#[utoipa::path(get, path = "/openapi.json", operation_id = "get_openapi", tag = "machines",
    responses((status = 200, body = Object, description = "OpenAPI 3.1")))]
pub(super) async fn serve() -> impl IntoResponse {
    // Made once and shared: it is large, and anybody may ask for it as often as they like and read it slowly.
    static TEXT: LazyLock<Bytes> = LazyLock::new(|| document().to_json().expect("the document is JSON").into());
    ([(header::CONTENT_TYPE, "application/json")], TEXT.clone())
}
