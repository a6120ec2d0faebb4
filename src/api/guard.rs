//! Keeps web pages out. The service can start commands on this machine, and any page in a browser on it can send requests
//! to loopback: by name (`Host`, against DNS rebinding) and by origin they must be ours.

use axum::http::header::{self, HeaderName};
use axum::http::request::Parts;

use super::Facts;
use super::problem::Problem;

/// What `Accept` may ask for.
const OURS: [&str; 6] =
    ["*/*", "application/*", "application/json", "application/problem+json", "text/*", "text/event-stream"];

fn text(request: &Parts, name: header::HeaderName) -> Option<String> {
    request.headers.get(name).map(|value| value.to_str().unwrap_or("?").to_owned())
}

/// Refuses a request that came by a foreign name. One with a good key needs no such check: no page has it that was led here.
pub(super) fn check_host(facts: &Facts, request: &Parts) -> Result<(), Problem> {
    // Who asks as one asks a proxy has the name in the URI, which counts.
    let host = request.uri.authority().map(|authority| authority.to_string());
    match host.or_else(|| text(request, header::HOST)) {
        Some(host) if is_ours(facts, &host) => Ok(()),
        host => Err(Problem::refused_host(&host.unwrap_or_default())),
    }
}

/// Refuses a request of a foreign page. One that only wants to have something shown, as an image say, names no origin, but browsers say that
/// it is another. The dashboard's own pages, which others may lead to, are not asked for here.
pub(super) fn check_origin(facts: &Facts, request: &Parts) -> Result<(), Problem> {
    let site = || text(request, HeaderName::from_static("sec-fetch-site"));
    match text(request, header::ORIGIN) {
        Some(origin) if !is_our_origin(facts, &origin) => Err(Problem::refused_origin(&origin)),
        None if site().is_some_and(|site| site.ends_with("-site")) => Err(Problem::refused_site()),
        _ => Ok(()),
    }
}

/// Refuses a request whose sender could do nothing with any answer of ours.
pub(super) fn check_accept(request: &Parts) -> Result<(), Problem> {
    let is_ours = |kind: &str| {
        let kind = kind.split(';').next().unwrap_or_default().trim();
        OURS.iter().any(|ours| kind.eq_ignore_ascii_case(ours))
    };
    let mut asked = request.headers.get_all(header::ACCEPT).iter().map(|kinds| kinds.to_str().unwrap_or_default());
    // None at all is anything (RFC 9110, 12.5.1).
    if request.headers.contains_key(header::ACCEPT) && !asked.any(|kinds| kinds.split(',').any(is_ours)) {
        return Err(Problem::not_acceptable());
    }
    Ok(())
}

fn is_our_origin(facts: &Facts, origin: &str) -> bool {
    // A page served by another program on this machine has a loopback host too, and another port.
    let own_port = |host: &str| split_port(host).1 == Some(facts.listen.port().to_string().as_str());
    match origin.split_once("://") {
        Some(("http", host)) if is_loopback(host) && own_port(host) => true,
        Some(_) => facts.public_url.as_deref().is_some_and(|url| url_origin(url) == origin),
        None => false,
    }
}

fn is_ours(facts: &Facts, host: &str) -> bool {
    let public = facts.public_url.as_deref().map(url_origin).and_then(|origin| origin.split_once("://"));
    is_loopback(host) || public.is_some_and(|(_, public)| public.eq_ignore_ascii_case(host))
}

/// Scheme, host and port of a URL.
fn url_origin(url: &str) -> &str {
    let start = url.find("://").map_or(0, |at| at + 3);
    let end = url[start..].find('/').map_or(url.len(), |at| start + at);
    &url[..end]
}

fn is_loopback(host: &str) -> bool {
    let name = split_port(host).0;
    let address = name.trim_start_matches('[').trim_end_matches(']');
    name.eq_ignore_ascii_case("localhost") || address.parse::<std::net::IpAddr>().is_ok_and(|ip| ip.is_loopback())
}

fn split_port(host: &str) -> (&str, Option<&str>) {
    match host.rsplit_once(':') {
        Some((name, port)) if !port.ends_with(']') && port.chars().all(|c| c.is_ascii_digit()) => (name, Some(port)),
        _ => (host, None),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn facts() -> Facts {
        let public_url = Some("https://runs.example.com/x".into());
        Facts::new(
            ([127, 0, 0, 1], 7410).into(),
            public_url,
            Default::default(),
            Default::default(),
            Default::default(),
        )
    }

    #[test]
    fn only_loopback_names_and_the_public_one_are_ours() {
        for host in ["localhost:7410", "127.0.0.1", "127.0.0.1:7410", "[::1]:7410", "LOCALHOST", "runs.example.com"] {
            assert!(is_ours(&facts(), host), "{host}");
        }
        for host in
            ["evil.example", "127.0.0.1.evil.example", "localhost.evil.example:7410", "", "10.0.0.1:7410", "[::2]:7410"]
        {
            assert!(!is_ours(&facts(), host), "{host}");
        }
    }

    #[test]
    fn only_our_own_pages_are_our_origin() {
        for origin in ["http://127.0.0.1:7410", "http://localhost:7410", "https://runs.example.com"] {
            assert!(is_our_origin(&facts(), origin), "{origin}");
        }
        for origin in
            ["http://evil.example", "http://localhost:3000", "http://localhost", "null", "http://runs.example.com", ""]
        {
            assert!(!is_our_origin(&facts(), origin), "{origin}");
        }
    }
}
