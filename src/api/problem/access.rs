//! What is said to those who may not, or not so often.

use axum::http::StatusCode;

use super::Problem;
use crate::domain::Scope;

impl Problem {
    /// `shown`: something was given for a key.
    pub(in crate::api) fn no_key(shown: bool) -> Self {
        let detail = match shown {
            true => {
                "This key is unknown, was revoked, or has expired: send another one as Authorization: Bearer st_..."
            }
            false => "Send a key, in the header Authorization: Bearer st_... `singletrack keys create` makes one.",
        };
        Self::new(StatusCode::UNAUTHORIZED, "not-authenticated", "A key is needed").with_detail(detail)
    }

    pub(in crate::api) fn not_allowed(name: &str, scope: Scope) -> Self {
        let scope = scope.as_str();
        Self::new(StatusCode::FORBIDDEN, "not-allowed", "The key is not for this").with_detail(format!(
            "Key `{name}` does not have the scope `{scope}`, which this call needs: use a key that has it, or `admin`."
        ))
    }

    pub(in crate::api) fn bound_key() -> Self {
        Self::new(StatusCode::FORBIDDEN, "not-allowed", "The key is not for this").with_detail(
            "It is bound to some workflows, and this is about all of them: use a key with the scope `admin` that is not.",
        )
    }

    pub(in crate::api) fn key_name_taken(name: &str) -> Self {
        Self::new(StatusCode::CONFLICT, "key-name-taken", "There is a key of this name").with_detail(format!(
            "`{name}` stands for that key in the history: choose another name, or revoke that one first."
        ))
    }

    pub(in crate::api) fn refused_host(host: &str) -> Self {
        Self::new(StatusCode::FORBIDDEN, "host-not-allowed", "This service does not go by that name").with_detail(
            format!(
                "Host `{}` is neither loopback nor that of SINGLETRACK_PUBLIC_URL: send one of these, or set that one to how \
                 others reach this service.",
                host.escape_debug()
            ),
        )
    }

    pub(in crate::api) fn refused_origin(origin: &str) -> Self {
        Self::foreign_page(format!(
            "Origin `{}` is neither this service's own nor that of SINGLETRACK_PUBLIC_URL: programs send none.",
            origin.escape_debug()
        ))
    }

    pub(in crate::api) fn refused_site() -> Self {
        Self::foreign_page(
            "By `Sec-Fetch-Site` a page of another site sent it, or led here: it may lead to `/` and `/docs`.",
        )
    }

    fn foreign_page(detail: impl Into<Box<str>>) -> Self {
        Self::new(StatusCode::FORBIDDEN, "origin-not-allowed", "Web pages of other origins may not use this service")
            .with_detail(detail)
    }

    /// `seconds`: until one more is let in.
    pub(in crate::api) fn too_many_requests(name: &str, seconds: u16) -> Self {
        Self {
            retry_after: Some(seconds),
            ..Self::new(StatusCode::TOO_MANY_REQUESTS, "too-many-requests", "The key sends too many requests")
                .with_detail(format!(
                    "Key `{name}` is over SINGLETRACK_KEY_RATE: repeat the request after the time in Retry-After."
                ))
        }
    }
}
