//! Sends a request to where it may go, and nowhere else.

use std::error::Error;
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::time::Duration;

use reqwest::dns::{Addrs, Name, Resolve, Resolving};
use reqwest::header::{HeaderMap, LOCATION};
use reqwest::{Proxy, Request, Response, redirect, retry};
use rustls::RootCertStore;
use url::{Host, Url};

use crate::domain::outgoing::{Allowed, Outgoing};
use crate::tls;

/// How long a connection may take: an address that nobody answers at must not use up the attempt's time limit.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(30);

/// The client of all `http` executors of a process.
///
/// Two places check an address, and every connection passes one of them: reqwest asks `Filter` for each name, and connects to
/// what it returned, so that no second look-up can lead elsewhere; a literal address is never looked up, and `check` has
/// read it from the very [`Url`] that reqwest gets, where decimal, octal and hexadecimal forms have become plain ones.
/// With a proxy it is the proxy that looks names up and connects.
pub struct Client {
    http: reqwest::Client,
    allowed: Arc<Allowed>,
    redirects: usize,
}

impl Client {
    /// Certificates are checked against the system's roots (`SSL_CERT_FILE` and `SSL_CERT_DIR` are heeded), or against
    /// Mozilla's as of the build where the system has none.
    ///
    /// # Errors
    /// When TLS can't be set up.
    pub fn new(outgoing: &Outgoing) -> Result<Self, reqwest::Error> {
        Self::trusting(tls::roots(), outgoing)
    }

    pub(super) fn trusting(roots: RootCertStore, outgoing: &Outgoing) -> Result<Self, reqwest::Error> {
        let allowed = Arc::new(outgoing.allowed.clone());
        let builder = reqwest::Client::builder()
            .tls_backend_preconfigured(tls::trusting(roots))
            .user_agent(concat!("singletrack/", env!("CARGO_PKG_VERSION")))
            .connect_timeout(CONNECT_TIMEOUT)
            .redirect(redirect::Policy::none())
            // A request is sent once: over a connection kept from before it might be sent again, and might go to where a
            // name led then.
            .retry(retry::never())
            .pool_max_idle_per_host(0)
            // What the environment names as a proxy is not asked.
            .no_proxy();
        let builder = match &outgoing.proxy {
            Some(proxy) => builder.proxy(Proxy::all(proxy.url().clone())?),
            None => builder.dns_resolver(Filter(Arc::clone(&allowed))),
        };
        Ok(Self { http: builder.build()?, allowed, redirects: outgoing.redirects })
    }

    /// Sends a request, and follows the redirects that the settings allow; says what went wrong. `headers` are the
    /// workflow's own, which may be secrets: another host does not get them.
    pub(super) async fn send(&self, mut request: Request, headers: &HeaderMap) -> Result<Response, String> {
        let mut followed = 0;
        loop {
            let url = request.url().clone();
            let host = url.host_str().unwrap_or_default();
            self.check(&url).map_err(|refused| refused.to_string())?;
            let again = request.try_clone();
            let response = self.http.execute(request).await.map_err(|error| explain(host, &error))?;
            let (Some(next), Some(again)) = (redirected(&url, &response), again) else { return Ok(response) };
            if followed == self.redirects {
                return Ok(response);
            }
            if url.scheme() == "https" && next.scheme() != "https" {
                return Err(format!("{host} redirects from https to {}, which is not followed", next.scheme()));
            }
            followed += 1;
            request = again;
            if next.origin() != url.origin() {
                headers.keys().for_each(|name| drop(request.headers_mut().remove(name)));
            }
            *request.url_mut() = next;
        }
    }

    /// Checks a literal address; a name is checked when it is looked up.
    fn check(&self, url: &Url) -> Result<(), Refused> {
        let address = match url.host() {
            Some(Host::Ipv4(v4)) => IpAddr::V4(v4),
            Some(Host::Ipv6(v6)) => IpAddr::V6(v6),
            Some(Host::Domain(_)) | None => return Ok(()),
        };
        if self.allowed.address(address) { Ok(()) } else { Err(Refused { address }) }
    }
}

/// Where an answer sends the request, with its method and body. 301, 302 and 303 make a GET of it, which would not carry the
/// run: those lead nowhere.
fn redirected(from: &Url, response: &Response) -> Option<Url> {
    let is_kept = matches!(response.status().as_u16(), 307 | 308);
    let location = response.headers().get(LOCATION).filter(|_| is_kept)?;
    from.join(location.to_str().ok()?).ok()
}

/// Why there is no answer.
fn explain(host: &str, error: &reqwest::Error) -> String {
    match causes(error).find_map(|cause| cause.downcast_ref::<Refused>()) {
        Some(refused) => refused.to_string(),
        None => format!("executor.url: no answer from {host}: {}", root_cause(error)),
    }
}

/// What is at the bottom of it: what is above says no more than that there was a request.
pub(super) fn root_cause(error: &reqwest::Error) -> String {
    causes(error).last().map(ToString::to_string).unwrap_or_default()
}

fn causes(error: &reqwest::Error) -> impl Iterator<Item = &(dyn Error + 'static)> {
    std::iter::successors(Some(error as &(dyn Error + 'static)), |&error| error.source())
}

/// An address that must not be reached.
#[derive(Debug, thiserror::Error)]
#[error(
    "executor.url leads to {address}, which is not a public address: to allow it add {address}, or the name it has, to \
     SINGLETRACK_HTTP_ALLOW of all workers"
)]
struct Refused {
    address: IpAddr,
}

/// Looks names up and keeps the addresses that may be reached.
struct Filter(Arc<Allowed>);

impl Resolve for Filter {
    fn resolve(&self, name: Name) -> Resolving {
        let allowed = Arc::clone(&self.0);
        Box::pin(async move {
            let found: Vec<SocketAddr> = tokio::net::lookup_host((name.as_str(), 0)).await?.collect();
            let is_trusted = allowed.name(name.as_str());
            let (good, refused): (Vec<_>, Vec<_>) =
                found.into_iter().partition(|found| is_trusted || allowed.address(found.ip()));
            match refused.first() {
                Some(found) if good.is_empty() => Err(Refused { address: found.ip() }.into()),
                _ => Ok(Box::new(good.into_iter()) as Addrs),
            }
        })
    }
}
