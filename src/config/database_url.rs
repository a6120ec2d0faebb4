//! `DATABASE_URL`, as libpq writes it where a database has several servers.

use std::fmt;
use std::str::FromStr;

use sqlx::postgres::PgConnectOptions;
use url::form_urlencoded;

/// A database URL that was understood. Its password is shown by nothing.
#[derive(Clone)]
pub struct DatabaseUrl {
    options: Vec<PgConnectOptions>,
    shown: String,
}

impl DatabaseUrl {
    /// How to connect to each server it names, in its order. `Servers` of the store finds the primary among them.
    pub fn options(&self) -> Vec<PgConnectOptions> {
        self.options.clone()
    }
}

impl FromStr for DatabaseUrl {
    type Err = String;

    fn from_str(url: &str) -> Result<Self, String> {
        let parts = Parts::of(url)?;
        let options = parts.each_server()?.iter().map(|url| connect_options(url)).collect::<Result<_, _>>()?;
        Ok(Self { options, shown: parts.shown() })
    }
}

impl fmt::Debug for DatabaseUrl {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        out.write_str(&self.shown)
    }
}

/// What sqlx understands of the URL of one server.
fn connect_options(url: &str) -> Result<PgConnectOptions, String> {
    // The parser's own message may quote the URL, and with it the password.
    let options = PgConnectOptions::from_str(url).map_err(|_| {
        "is not a postgres:// URL that can be understood; special characters in a password must be %-encoded".to_owned()
    })?;
    // Of what sqlx asks for when it connects, poolers refuse this one; it is for floats as text, which we don't read.
    Ok(options.application_name("singletrack").extra_float_digits(None))
}

/// A URL taken apart as far as it takes to see the hosts. sqlx's own parser wants exactly one.
struct Parts<'a> {
    scheme: &'a str,
    user: Option<&'a str>,
    hosts: &'a str,
    path: &'a str,
    query: &'a str,
    /// Those of the query, without what is for us alone.
    parameters: Vec<(String, String)>,
}

impl<'a> Parts<'a> {
    fn of(url: &'a str) -> Result<Self, String> {
        let Some((scheme @ ("postgres" | "postgresql"), rest)) = url.split_once("://") else {
            return Err("is not a postgres:// URL".into());
        };
        let (authority, path) = rest.split_at(rest.find(['/', '?']).unwrap_or(rest.len()));
        let (path, query) = path.split_once('?').unwrap_or((path, ""));
        let (user, hosts) = match authority.rsplit_once('@') {
            Some((user, hosts)) => (Some(user), hosts),
            None => (None, authority),
        };
        let mut parameters: Vec<_> = form_urlencoded::parse(query.as_bytes()).into_owned().collect();
        let wanted = take(&mut parameters, &["target_session_attrs"]);
        if wanted.is_some_and(|wanted| !["read-write", "primary"].contains(&&*wanted)) {
            return Err("target_session_attrs can only be read-write or primary, and may be left out: \
                        the server that takes writes is used"
                .into());
        }
        Ok(Self { scheme, user, hosts, path, query, parameters })
    }

    /// A URL for each host.
    fn each_server(&self) -> Result<Vec<String>, String> {
        let mut parameters = self.parameters.clone();
        let (host, port) = (take(&mut parameters, &["host", "hostaddr"]), take(&mut parameters, &["port"]));
        let hosts: Vec<&str> = host.as_deref().unwrap_or(self.hosts).split(',').collect();
        let ports: Vec<&str> = port.iter().flat_map(|ports| ports.split(',')).collect();
        if ports.len() > 1 && ports.len() != hosts.len() {
            let (ports, hosts) = (ports.len(), hosts.len());
            return Err(format!("names {ports} ports for {hosts} hosts: name one for each, or one for all"));
        }
        if hosts.len() == 1 && !self.hosts.contains(',') {
            return Ok(vec![self.url(self.hosts, &self.parameters)]);
        }
        let servers = hosts.iter().enumerate().map(|(number, named)| {
            // A port may stand behind the host, but not where the host is a parameter: that may be a path or an IPv6 address.
            let (name, own_port) = if host.is_some() { (*named, None) } else { with_port(named) };
            if name.is_empty() {
                return Err("names several hosts, and one of them is empty".to_owned());
            }
            let mut parameters = parameters.clone();
            parameters.push(("host".into(), name.to_owned()));
            let port = ports.get(number).or(ports.first()).copied().or(own_port);
            if let Some(port) = port.filter(|port| !port.is_empty()) {
                port.parse::<u16>().map_err(|_| format!("`{port}` is not a port"))?;
                parameters.push(("port".into(), port.to_owned()));
            }
            // The parameter wins; a user must have a host behind it.
            Ok(self.url("localhost", &parameters))
        });
        servers.collect()
    }

    fn url(&self, hosts: &str, parameters: &[(String, String)]) -> String {
        let Self { scheme, path, .. } = self;
        let user = self.user.map(|user| format!("{user}@")).unwrap_or_default();
        let parameters = form_urlencoded::Serializer::new(String::new()).extend_pairs(parameters).finish();
        let mark = if parameters.is_empty() { "" } else { "?" };
        format!("{scheme}://{user}{hosts}{path}{mark}{parameters}")
    }

    /// The URL for people.
    fn shown(&self) -> String {
        let Self { scheme, hosts, path, query, .. } = self;
        let user = self.user.map(|user| match user.split_once(':') {
            Some((name, _)) => format!("{name}:***@"),
            None => format!("{user}@"),
        });
        let is_password =
            |parameter: &&str| form_urlencoded::parse(parameter.as_bytes()).any(|(name, _)| name == "password");
        let hide = |parameter| if is_password(&parameter) { "password=***" } else { parameter };
        let query = query.split('&').map(hide).collect::<Vec<_>>().join("&");
        let mark = if query.is_empty() { "" } else { "?" };
        format!("{scheme}://{}{hosts}{path}{mark}{query}", user.unwrap_or_default())
    }
}

/// Removes the parameters of these names; the last one wins.
fn take(parameters: &mut Vec<(String, String)>, names: &[&str]) -> Option<String> {
    let (taken, kept) = std::mem::take(parameters).into_iter().partition(|(name, _)| names.contains(&name.as_str()));
    *parameters = kept;
    let taken: Vec<(String, String)> = taken;
    taken.into_iter().next_back().map(|(_, value)| value)
}

/// Takes `host:port` apart; an IPv6 address is in brackets.
fn with_port(host: &str) -> (&str, Option<&str>) {
    let (name, port) = match host.rsplit_once(':') {
        Some((name, port)) if !port.contains(']') => (name, Some(port)),
        _ => (host, None),
    };
    (name.trim_start_matches('[').trim_end_matches(']'), port)
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "a test fails by panicking")]
mod tests {
    use super::*;

    /// Host or socket, and port, of each server.
    fn servers(url: &str) -> Vec<(String, u16)> {
        let url: DatabaseUrl = url.parse().unwrap();
        let place = |options: &PgConnectOptions| match options.get_socket() {
            Some(socket) => socket.display().to_string(),
            None => options.get_host().to_owned(),
        };
        url.options().iter().map(|options| (place(options), options.get_port())).collect()
    }

    fn pairs(list: &[(&str, u16)]) -> Vec<(String, u16)> {
        list.iter().map(|(host, port)| ((*host).to_owned(), *port)).collect()
    }

    fn mistake(url: &str) -> String {
        url.parse::<DatabaseUrl>().unwrap_err()
    }

    #[test]
    fn several_hosts_are_written_as_libpq_has_them() {
        let both = pairs(&[("h1", 5432), ("h2", 5433)]);
        assert_eq!(servers("postgres://me:pw@h1:5432,h2:5433/db?sslmode=disable"), both);
        assert_eq!(servers("postgresql:///db?host=h1,h2&port=5432,5433"), both);
        assert_eq!(servers("postgres://me@/db?host=h1%2Ch2&port=5432%2C5433&target_session_attrs=read-write"), both);
        assert_eq!(servers("postgres://h1:1,h2:2/db?port=7"), pairs(&[("h1", 7), ("h2", 7)]), "one port for all");
        assert_eq!(
            servers("postgres://[::1]:5432,[fd00::2]:7,h3:1/db"),
            pairs(&[("::1", 5432), ("fd00::2", 7), ("h3", 1)])
        );
        let sockets = pairs(&[("/run/a", 5432), ("/run/b", 5433)]);
        assert_eq!(servers("postgres://me@localhost/db?host=/run/a,/run/b&port=5432,5433"), sockets);
        assert_eq!(servers("postgres://me@h1:1,h2:2/db?host=h9&port=3"), pairs(&[("h9", 3)]), "the parameter wins");
    }

    #[test]
    fn each_server_gets_what_else_the_url_says() {
        let url: DatabaseUrl =
            "postgres://me:p%40ss@h1:1,h2:2/d%2Fb?sslmode=require&options=-c%20a%3Db%26c".parse().unwrap();
        for options in url.options() {
            assert_eq!((options.get_username(), options.get_database()), ("me", Some("d/b")));
            assert_eq!(options.get_options(), Some("-c a=b&c"));
            assert!(matches!(options.get_ssl_mode(), sqlx::postgres::PgSslMode::Require));
            assert_eq!(options.get_application_name(), Some("singletrack"));
        }
    }

    #[test]
    fn one_host_is_what_it_always_was() {
        assert_eq!(servers("postgres://me@h1:7/db"), pairs(&[("h1", 7)]));
        assert_eq!(
            servers("postgres://me@localhost:5432/db?host=%2Frun%2Fa%20b&sslmode=disable"),
            pairs(&[("/run/a b", 5432)])
        );
        assert_eq!(servers("postgres:///db?host=/run/a&port=9&target_session_attrs=primary"), pairs(&[("/run/a", 9)]));
    }

    #[test]
    fn what_can_not_be_is_told_without_the_password() {
        assert_eq!(mistake("mysql://h/db"), "is not a postgres:// URL");
        let ports = mistake("postgres://me:secret@h1,h2,h3/db?port=1,2");
        assert_eq!(ports, "names 2 ports for 3 hosts: name one for each, or one for all");
        assert_eq!(mistake("postgres://me:secret@h1,,h3/db"), "names several hosts, and one of them is empty");
        assert_eq!(mistake("postgres://me:secret@h1:x,h2:1/db"), "`x` is not a port");
        for attribute in ["any", "standby", "prefer-standby", "read-only", ""] {
            let told = mistake(&format!("postgres://me:secret@h1,h2/db?target_session_attrs={attribute}"));
            assert!(told.starts_with("target_session_attrs can only be read-write or primary"), "{told}");
        }
        assert!(mistake("postgres://me:sec/ret@h1/db").contains("%-encoded"));
    }

    #[test]
    fn all_hosts_are_shown_and_no_password() {
        let shown = |url: &str| format!("{:?}", url.parse::<DatabaseUrl>().unwrap());
        assert_eq!(shown("postgres://me:secret@h1:1,h2:2/db"), "postgres://me:***@h1:1,h2:2/db");
        assert_eq!(
            shown("postgres:///db?host=h1,h2&password=secret&port=1,2"),
            "postgres:///db?host=h1,h2&password=***&port=1,2"
        );
        assert_eq!(shown("postgres://me@h1/db?host=%2Frun%2Fa"), "postgres://me@h1/db?host=%2Frun%2Fa");
    }
}
