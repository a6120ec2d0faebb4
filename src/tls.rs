//! How the service and its command line trust the servers they call.

use std::sync::Arc;

use rustls::{ClientConfig, RootCertStore, crypto::ring};

/// The system's roots (`SSL_CERT_FILE` and `SSL_CERT_DIR` are heeded), or Mozilla's as of the build where the system has
/// none, as in a bare container.
pub(crate) fn roots() -> RootCertStore {
    let mut roots = RootCertStore::empty();
    roots.add_parsable_certificates(rustls_native_certs::load_native_certs().certs);
    if roots.is_empty() {
        roots.extend(webpki_roots::TLS_SERVER_ROOTS.iter().cloned());
    }
    roots
}

/// TLS that trusts these roots and shows no certificate of its own.
pub(crate) fn trusting(roots: RootCertStore) -> ClientConfig {
    ClientConfig::builder_with_provider(Arc::new(ring::default_provider()))
        .with_safe_default_protocol_versions()
        .expect("ring has the protocol versions of rustls")
        .with_root_certificates(roots)
        .with_no_client_auth()
}
