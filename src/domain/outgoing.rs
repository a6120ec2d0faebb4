//! Whom the service may send a request to on behalf of a workflow. Whoever may write a workflow chooses its URL, and must
//! reach nothing by it that only the service can reach: its own machine, its network, its cloud's metadata.

use std::fmt;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::str::FromStr;

use ipnet::{IpNet, Ipv4Net, Ipv6Net};
use url::Url;

/// How requests leave.
#[derive(Clone, Debug, Default)]
pub struct Outgoing {
    /// What may be reached besides public addresses; nothing by default.
    pub allowed: Allowed,
    /// Through which they all go; by default none, whatever the environment names.
    pub proxy: Option<Proxy>,
    /// How many redirects of one request are followed; by default 0.
    pub redirects: usize,
}

/// What may be reached besides public addresses: ranges of addresses, and names, whatever addresses they have.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Allowed {
    ranges: Vec<IpNet>,
    names: Vec<String>,
}

impl Allowed {
    /// Whether this address may be reached, by whatever name.
    pub fn address(&self, address: IpAddr) -> bool {
        // What is written to such an address arrives at the IPv4 address in it: that one counts.
        let arrives_at = match address {
            IpAddr::V6(v6) => embedded(v6).map_or(address, IpAddr::V4),
            IpAddr::V4(_) => address,
        };
        is_public(arrives_at) || self.ranges.iter().any(|range| range.contains(&arrives_at))
    }

    /// Whether this name may be reached, whatever address it has.
    pub fn name(&self, name: &str) -> bool {
        let name = name.strip_suffix('.').unwrap_or(name).to_ascii_lowercase();
        self.names.iter().any(|allowed| match allowed.strip_prefix('*') {
            Some(domain) => name.ends_with(domain),
            None => name == *allowed,
        })
    }
}

impl FromStr for Allowed {
    type Err = String;

    fn from_str(list: &str) -> Result<Self, String> {
        let mut allowed = Self::default();
        for entry in list.split(',').map(str::trim) {
            if let Some(range) = range(entry)? {
                allowed.ranges.push(range);
            } else {
                allowed.names.push(name(entry)?);
            }
        }
        Ok(allowed)
    }
}

impl fmt::Display for Allowed {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        let ranges = self.ranges.iter().map(ToString::to_string);
        let all: Vec<String> = ranges.chain(self.names.iter().cloned()).collect();
        out.write_str(&all.join(","))
    }
}

/// The range that an entry stands for; `None` where it is to be a name.
fn range(entry: &str) -> Result<Option<IpNet>, String> {
    let range = match (entry.parse::<IpAddr>(), entry.parse::<IpNet>()) {
        (Ok(address), _) => IpNet::from(address),
        (_, Ok(range)) => range,
        _ => return Ok(None),
    };
    if range.addr() != range.network() {
        return Err(format!("`{entry}` is not where a range begins: write {} or a longer prefix", range.trunc()));
    }
    match range {
        IpNet::V6(v6) if embedded(v6.addr()).is_some() => {
            Err(format!("`{entry}`: write the IPv4 address that is in it"))
        }
        _ => Ok(Some(range)),
    }
}

fn name(entry: &str) -> Result<String, String> {
    let name = entry.strip_prefix("*.").unwrap_or(entry);
    let is_label = |label: &str| {
        (1..=63).contains(&label.len()) && label.chars().all(|c| c.is_ascii_alphanumeric() || c == '-' || c == '_')
    };
    // A name with digits at its end would be read as an address, and never be looked up.
    let is_number = name.rsplit('.').next().is_some_and(|last| last.chars().all(|c| c.is_ascii_digit()));
    if !name.split('.').all(is_label) || is_number {
        return Err(format!(
            "`{entry}` is neither a range of addresses such as 10.0.0.0/8 nor a name such as jobs.internal or *.internal"
        ));
    }
    Ok(entry.to_ascii_lowercase())
}

/// The IPv4 address that an IPv6 address stands for: mapped (RFC 4291), or translated by NAT64 (RFC 6052).
fn embedded(address: Ipv6Addr) -> Option<Ipv4Addr> {
    const NAT64: Ipv6Net = Ipv6Net::new_assert(Ipv6Addr::new(0x64, 0xff9b, 0, 0, 0, 0, 0, 0), 96);
    let [.., a, b, c, d] = address.octets();
    address.to_ipv4_mapped().or_else(|| NAT64.contains(&address).then(|| Ipv4Addr::new(a, b, c, d)))
}

/// Ranges of IPv4 that are not public: IANA's special-purpose registry, multicast, and what is reserved.
const SPECIAL_V4: [Ipv4Net; 16] = [
    v4([0, 0, 0, 0], 8),
    v4([10, 0, 0, 0], 8),
    v4([100, 64, 0, 0], 10), // between a provider and its customers; some clouds have their metadata here
    v4([127, 0, 0, 0], 8),
    v4([168, 63, 129, 16], 32), // public by its number, but Azure's own service to each machine
    v4([169, 254, 0, 0], 16),   // link-local; most clouds have their metadata here
    v4([172, 16, 0, 0], 12),
    v4([192, 0, 0, 0], 24),
    v4([192, 0, 2, 0], 24),   // documentation
    v4([192, 88, 99, 0], 24), // relays of 6to4
    v4([192, 168, 0, 0], 16),
    v4([198, 18, 0, 0], 15),   // benchmarks
    v4([198, 51, 100, 0], 24), // documentation
    v4([203, 0, 113, 0], 24),  // documentation
    v4([224, 0, 0, 0], 4),     // multicast
    v4([240, 0, 0, 0], 4),     // reserved, and the broadcast address
];

/// All that IPv6 has handed out for public use. Everything else is loopback, private, link-local, multicast or reserved.
const GLOBAL_V6: Ipv6Net = v6(0x2000, 0, 3);

/// Ranges inside [`GLOBAL_V6`] that are not public. Tunnels carry an IPv4 address, and have died out.
const SPECIAL_V6: [Ipv6Net; 4] = [
    v6(0x2001, 0, 23),     // the IETF's own: Teredo, benchmarks, identifiers
    v6(0x2001, 0xdb8, 32), // documentation
    v6(0x2002, 0, 16),     // 6to4
    v6(0x3fff, 0, 20),     // documentation
];

const fn v4([a, b, c, d]: [u8; 4], prefix: u8) -> Ipv4Net {
    Ipv4Net::new_assert(Ipv4Addr::new(a, b, c, d), prefix)
}

const fn v6(first: u16, second: u16, prefix: u8) -> Ipv6Net {
    Ipv6Net::new_assert(Ipv6Addr::new(first, second, 0, 0, 0, 0, 0, 0), prefix)
}

fn is_public(address: IpAddr) -> bool {
    match address {
        IpAddr::V4(v4) => !SPECIAL_V4.iter().any(|range| range.contains(&v4)),
        IpAddr::V6(v6) => GLOBAL_V6.contains(&v6) && !SPECIAL_V6.iter().any(|range| range.contains(&v6)),
    }
}

/// The URL of a proxy. Its password is shown by nothing.
#[derive(Clone)]
pub struct Proxy(Url);

impl Proxy {
    /// The URL, with user and password.
    pub fn url(&self) -> &Url {
        &self.0
    }
}

impl FromStr for Proxy {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match Url::parse(text) {
            Ok(url) if matches!(url.scheme(), "http" | "https") && matches!(url.path(), "" | "/") => Ok(Self(url)),
            // The text may hold a password.
            _ => Err("must be a URL such as http://proxy.internal:3128".into()),
        }
    }
}

impl fmt::Display for Proxy {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut shown = self.0.clone();
        if shown.password().is_some() {
            // Fails for URLs without a host only.
            let _ = shown.set_password(Some("***"));
        }
        write!(out, "{shown}")
    }
}

impl fmt::Debug for Proxy {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(out, "{self}")
    }
}
