//! The OpenAPI document.

use axum::Json;
use utoipa::openapi::OpenApi;
use utoipa::openapi::security::{HttpAuthScheme, HttpBuilder, SecurityScheme};

/// The document of every route.
pub fn document() -> OpenApi {
    let mut document = super::routes().split_for_parts().1;
    document.info.title = "Singletrack".into();
    document.info.version = env!("CARGO_PKG_VERSION").into();
    document.info.description = Some(
        "Runs each workflow at most once at a time. Errors are `application/problem+json` (RFC 9457) with a stable `type`; \
         times are RFC 3339 in UTC. The scope each route will need is named under `api_key`; this version listens on \
         loopback only and asks for no key."
            .into(),
    );
    let mut bearer = HttpBuilder::new().scheme(HttpAuthScheme::Bearer).build();
    bearer.description = Some("Not asked for by this version.".into());
    document.components.get_or_insert_default().add_security_scheme("api_key", SecurityScheme::Http(bearer));
    document
}

/// This document
#[utoipa::path(get, path = "/openapi.json", tag = "machines", security(()),
    responses((status = 200, body = Object, description = "OpenAPI 3.1")))]
pub(super) async fn serve() -> Json<OpenApi> {
    Json(document())
}
