//! What may be reached.

use std::net::IpAddr;

use super::*;
use crate::domain::Definition;

/// What every refusal says.
const REFUSED: &str = "which is not a public address: to allow it add ";

#[tokio::test]
async fn loopback_is_refused_in_every_spelling() {
    let server = Server::answering(answer("200 OK", &[], "")).await;
    for host in [
        "127.0.0.1",
        "127.0.0.1.",
        "127.1",
        "127.255.255.254",
        "2130706433",
        "0x7f000001",
        "0x7f.1",
        "0177.0.0.1",
        "017700000001",
        "%31%32%37.0.0.1",
        "１２７.0.0.1",
        "①②⑦.⓪.⓪.①",
        "127。0。0。1",
        "0.0.0.0",
        "0",
        "[::1]",
        "[0:0:0:0:0:0:0:1]",
        "[::]",
        "[::ffff:127.0.0.1]",
        "[::ffff:7f00:1]",
        "[::127.0.0.1]",
        "[64:ff9b::127.0.0.1]",
        "[2002:7f00:1::]",
        "localhost",
        "LocalHost",
    ] {
        let seen = to(format!("http://{host}:{}/", server.port)).allowing("").run().await;
        assert_eq!(seen.verdict(), Verdict::Failed, "{host}");
        let error = seen.error();
        assert!(error.starts_with("executor.url leads to ") && error.contains(REFUSED), "{host}: {error}");
        assert!(error.contains("SINGLETRACK_HTTP_ALLOW"), "{host}: {error}");
    }
    for host in ["[fe80::1%25lo]", "[::1%lo]", "256.256.256.256", "1.2.3.4.5"] {
        let seen = to(format!("http://{host}:{}/", server.port)).allowing("").run().await;
        assert!(seen.error().starts_with("executor.url: "), "{host}: {}", seen.error());
    }
    assert!(server.requests().is_empty());
}

#[test]
fn a_url_that_the_client_would_not_take_is_no_definition() {
    for (url, told) in [
        ("jobs.example.com/nightly", "is not a URL such as https://"),
        ("file:///etc/passwd", "must begin with http:// or https://"),
        ("ftp://jobs.example.com", "must begin with http:// or https://"),
        ("http://", "is not a URL such as https://"),
        ("http://[fe80::1%25lo]/", "is not a URL such as https://"),
        ("http://256.256.256.256/", "is not a URL such as https://"),
        ("http://me@jobs.example.com/", "must not hold a user or password"),
        ("http:\\\\me:word@jobs.example.com", "must not hold a user or password"),
        ("http://jobs.example.com/a b", "has a space or control character"),
        ("http://jobs.exa\tmple.com/", "has a space or control character"),
    ] {
        let definition = json!({"executor": {"type": "http", "url": url}});
        let definition: Definition = serde_json::from_value(definition).expect("a definition");
        let mistakes = definition.mistakes();
        assert_eq!(mistakes.len(), 1, "{url}: {mistakes:?}");
        assert_eq!(mistakes[0].0, "/executor/url");
        assert!(mistakes[0].1.starts_with(told), "{url}: {mistakes:?}");
    }
}

#[tokio::test]
async fn what_is_allowed_by_range_or_by_name_is_reached() {
    let server = Server::answering(answer("200 OK", &[], "")).await;
    for (list, host, is_reached) in [
        ("127.0.0.1", "127.0.0.1", true),
        ("127.0.0.0/8", "localhost", true),
        ("10.0.0.0/8, 127.0.0.0/8", "0x7f000001", true),
        ("localhost", "LOCALHOST", true),
        ("localhost", "127.0.0.1", false),
        ("10.0.0.0/8", "127.0.0.1", false),
        ("*.localhost", "localhost", false),
        ("notlocalhost", "localhost", false),
    ] {
        let seen = to(format!("http://{host}:{}/", server.port)).allowing(list).run().await;
        assert_eq!(seen.verdict() == Verdict::Succeeded, is_reached, "{list}: {host}: {}", seen.error());
        assert!(is_reached || seen.error().contains(REFUSED), "{list}: {host}: {}", seen.error());
    }
    assert_eq!(server.requests().len(), 4);
}

#[test]
fn only_public_addresses_are_public() {
    let nothing = Allowed::default();
    let allowed = |address: &str| nothing.address(address.parse::<IpAddr>().expect(address));
    for refused in [
        "0.0.0.0",
        "0.1.2.3",
        "10.0.0.1",
        "10.255.255.255",
        "100.64.0.1",
        "100.100.100.200",
        "100.127.255.255",
        "127.0.0.53",
        "168.63.129.16",
        "169.254.169.254",
        "172.16.0.1",
        "172.31.255.255",
        "192.0.0.192",
        "192.0.2.1",
        "192.88.99.1",
        "192.168.0.1",
        "198.18.0.1",
        "198.19.255.255",
        "198.51.100.1",
        "203.0.113.1",
        "224.0.0.1",
        "239.255.255.255",
        "240.0.0.1",
        "255.255.255.255",
        "::",
        "::1",
        "::127.0.0.1",
        "::8.8.8.8",
        "::ffff:10.0.0.1",
        "::ffff:169.254.169.254",
        "::ffff:0:127.0.0.1",
        "64:ff9b::10.0.0.1",
        "64:ff9b::a9fe:a9fe",
        "64:ff9b:1::8.8.8.8",
        "100::1",
        "2001::1",
        "2001:0:4136:e378::1",
        "2001:2::1",
        "2001:10::1",
        "2001:20::1",
        "2001:db8::1",
        "2002:7f00:1::1",
        "2002:808:808::1",
        "3fff::1",
        "3fff:fff::1",
        "5f00::1",
        "fc00::1",
        "fd00:ec2::254",
        "fd20:ce::254",
        "fe80::1",
        "febf::1",
        "fec0::1",
        "ff02::1",
        "ff0e::1",
    ] {
        assert!(!allowed(refused), "{refused}");
    }
    for public in [
        "1.1.1.1",
        "8.8.8.8",
        "9.255.255.255",
        "11.0.0.0",
        "93.184.216.34",
        "100.63.255.255",
        "100.128.0.0",
        "126.255.255.255",
        "128.0.0.0",
        "168.63.129.15",
        "169.253.255.255",
        "169.255.0.0",
        "172.15.255.255",
        "172.32.0.0",
        "192.0.1.0",
        "192.167.255.255",
        "192.169.0.0",
        "198.17.255.255",
        "198.20.0.0",
        "223.255.255.255",
        "::ffff:8.8.8.8",
        "64:ff9b::8.8.8.8",
        "2001:200::1",
        "2001:4860:4860::8888",
        "2003::1",
        "2606:4700::1111",
        "2a00:1450::1",
        "3ffe::1",
    ] {
        assert!(allowed(public), "{public}");
    }
}

#[test]
fn a_range_covers_the_forms_that_arrive_in_it() {
    let allowed: Allowed = "10.1.0.0/16,fd00::/8,::1".parse().expect("a list");
    for (address, expected) in [
        ("10.1.2.3", true),
        ("10.2.0.1", false),
        ("::ffff:10.1.2.3", true),
        ("64:ff9b::10.1.2.3", true),
        ("::ffff:10.2.0.1", false),
        ("fd12::1", true),
        ("fe80::1", false),
        ("::1", true),
        ("127.0.0.1", false),
    ] {
        assert_eq!(allowed.address(address.parse().expect(address)), expected, "{address}");
    }
}

#[test]
fn a_name_covers_itself_and_a_star_what_is_below() {
    let allowed: Allowed = "jobs.internal, *.Corp.example".parse().expect("a list");
    for (name, expected) in [
        ("jobs.internal", true),
        ("JOBS.internal.", true),
        ("a.jobs.internal", false),
        ("xjobs.internal", false),
        ("internal", false),
        ("a.corp.example", true),
        ("a.b.corp.example", true),
        ("corp.example", false),
        ("evilcorp.example", false),
        ("a.corp.example.evil.example", false),
    ] {
        assert_eq!(allowed.name(name), expected, "{name}");
    }
    assert_eq!(allowed.to_string().parse::<Allowed>(), Ok(allowed), "what is shown can be given again");
}

#[test]
fn a_wrong_entry_is_quoted_with_what_to_write() {
    for (entry, told) in [
        ("10.1.2.3/8", "10.0.0.0/8"),
        ("10.0.0.0/33", "10.0.0.0/8"),
        ("http://jobs.internal", "jobs.internal or *.internal"),
        ("jobs.internal:8080", "jobs.internal or *.internal"),
        ("*", "*.internal"),
        ("*.*.internal", "*.internal"),
        ("jobs.*", "*.internal"),
        ("", "10.0.0.0/8"),
        ("10.0.0", "10.0.0.0/8"),
        ("2130706433", "10.0.0.0/8"),
        ("[::1]", "10.0.0.0/8"),
        ("::ffff:10.0.0.1", "IPv4"),
        ("64:ff9b::/96", "IPv4"),
    ] {
        let error = format!("jobs.internal,{entry}").parse::<Allowed>().expect_err(entry);
        assert!(error.contains(&format!("`{entry}`")) && error.contains(told), "{error}");
    }
}
