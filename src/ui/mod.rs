//! The dashboard: files that are in the binary, and the one handler that serves them. What they show they read from the public API,
//! as any client would; nothing here knows it.
//!
//! They are modules of plain JavaScript without a build step: `main.js` has the router, `api.js` and `live.js` speak with the
//! server, `dom.js`, `format.js` and `parts.js` are what screens are made of, and there is one file per screen. Screens are named behind the
//! `#` of the address (`/#/runs/{id}`), so that a proxy may serve all of it under a path of its own. `docs.js` is another page: the API
//! for people to read, from its OpenAPI document.

use std::hash::{DefaultHasher, Hash as _, Hasher as _};

use axum::Router;
use axum::body::Body;
use axum::http::{HeaderMap, Response, header};
use axum::routing::get;

/// What a browser may do with these pages: run our files, and speak with us. Nothing inline, nothing from elsewhere, in nobody's frame.
const POLICY: &str = "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src 'self' data:; \
                      form-action 'none'; base-uri 'none'; frame-ancestors 'none'";

/// A file of the dashboard.
struct File {
    name: &'static str,
    text: &'static str,
}

macro_rules! files {
    ($($name:literal),+ $(,)?) => {
        [$(File { name: $name, text: include_str!($name) }),+]
    };
}

const FILES: &[File] = &files![
    "actions.js",
    "ansi.js",
    "api.js",
    "base.css",
    "docs.css",
    "docs.html",
    "docs.js",
    "dom.js",
    "format.js",
    "history.js",
    "icon.svg",
    "index.html",
    "live.js",
    "log.js",
    "main.js",
    "parts.js",
    "run.js",
    "runs.js",
    "screens.css",
    "signin.js",
    "slots.js",
    "status.js",
    "system.js",
    "workers.js",
    "workflow.js",
];

impl File {
    fn media_type(&self) -> &'static str {
        match self.name.rsplit_once('.') {
            Some((_, "html")) => "text/html; charset=utf-8",
            Some((_, "js")) => "text/javascript; charset=utf-8",
            Some((_, "css")) => "text/css; charset=utf-8",
            Some((_, "svg")) => "image/svg+xml",
            _ => "text/plain; charset=utf-8",
        }
    }

    /// Changes with the text; the same on every replica of a version.
    fn etag(&self) -> String {
        let mut hasher = DefaultHasher::new();
        self.text.hash(&mut hasher);
        format!("\"{:016x}\"", hasher.finish())
    }

    /// The answer to a request with these headers.
    fn answer(&self, headers: &HeaderMap) -> Response<Body> {
        let etag = self.etag();
        let known = headers.get_all(header::IF_NONE_MATCH).iter().filter_map(|tags| tags.to_str().ok());
        let is_known = known
            .flat_map(|tags| tags.split(','))
            .any(|tag| tag.trim().trim_start_matches("W/") == etag || tag.trim() == "*");
        let response = Response::builder()
            .header(header::ETAG, etag)
            // Kept, and asked for each time: a new version of the service is a new dashboard at once.
            .header(header::CACHE_CONTROL, "no-cache")
            .header(header::CONTENT_SECURITY_POLICY, POLICY)
            .header(header::X_CONTENT_TYPE_OPTIONS, "nosniff")
            .header(header::REFERRER_POLICY, "no-referrer")
            .header("cross-origin-opener-policy", "same-origin");
        let response = if is_known {
            response.status(304).body(Body::empty())
        } else {
            response.header(header::CONTENT_TYPE, self.media_type()).body(Body::from(self.text))
        };
        response.unwrap_or_default()
    }
}

/// The dashboard at `/`, the API to read at `/docs`, and their files under `/ui/`. They are no secret, and need no key: what they show does.
pub fn router() -> Router {
    FILES.iter().fold(Router::new(), |router, file| {
        let path = match file.name {
            "index.html" => "/".to_owned(),
            "docs.html" => "/docs".to_owned(),
            name => format!("/ui/{name}"),
        };
        router.route(&path, get(async |headers: HeaderMap| file.answer(&headers)))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_file_of_the_folder_is_served_and_none_is_long() {
        let folder = concat!(env!("CARGO_MANIFEST_DIR"), "/src/ui");
        let mut names: Vec<_> = std::fs::read_dir(folder)
            .expect("it is there")
            .map(|entry| entry.expect("it is there").file_name().into_string().expect("it is there"))
            .filter(|name| !name.ends_with(".rs"))
            .collect();
        names.sort();
        assert_eq!(names, FILES.iter().map(|file| file.name).collect::<Vec<_>>());
        for file in FILES {
            assert!(file.text.lines().count() <= 500, "{} is too long", file.name);
        }
    }

    #[test]
    fn nothing_is_inline_and_nothing_comes_from_elsewhere() {
        for file in FILES {
            let text = file.text.replace("http://www.w3.org/", "");
            for foreign in
                ["<script>", "<style", " style=\"", " onclick=\"", "src=\"http", "href=\"http", "url(http", "innerHTML"]
            {
                assert!(!text.contains(foreign), "{}: {foreign}", file.name);
            }
        }
    }

    #[test]
    fn whoever_has_a_file_is_not_sent_it_again() {
        let file = &FILES[0];
        let mut headers = HeaderMap::new();
        assert_eq!(file.answer(&headers).status(), 200);
        headers.insert(header::IF_NONE_MATCH, format!("\"x\", W/{}", file.etag()).parse().expect("it is there"));
        assert_eq!(file.answer(&headers).status(), 304);
        headers.insert(header::IF_NONE_MATCH, "\"x\"".parse().expect("it is there"));
        assert_eq!(file.answer(&headers).status(), 200);
    }
}
