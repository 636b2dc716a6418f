//! Addresses of expert servers.

use tonic::transport::Uri;

/// Where an expert server listens. Two ways of writing one address are equal.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub(super) struct Address {
    /// Whether it is spoken to over TLS.
    pub(super) tls: bool,
    host: String,
    port: u16,
}

impl Address {
    /// The address of an endpoint, `http://HOST:PORT` or `https://HOST:PORT`.
    ///
    /// # Errors
    /// Why it is none. The text is not repeated.
    pub(super) fn parse(endpoint: &str) -> Result<Self, String> {
        let uri: Uri = endpoint.parse().map_err(|error| format!("{error}"))?;
        let tls = match uri.scheme_str() {
            Some("http") => false,
            Some("https") => true,
            _ => return Err("it has another scheme".to_owned()),
        };
        let (Some(host), Some(port)) = (uri.host(), uri.port_u16()) else {
            return Err("it has no port".to_owned());
        };
        if uri
            .authority()
            .is_some_and(|authority| authority.as_str().contains('@'))
        {
            return Err("it holds a user".to_owned());
        }
        Ok(Self {
            tls,
            host: host.to_ascii_lowercase(),
            port,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_address_may_be_written_in_several_ways() {
        let address = |text: &str| Address::parse(text).unwrap();
        assert_eq!(
            address("https://Experts.example:1"),
            address("https://experts.EXAMPLE:1/")
        );
        assert_eq!(address("http://[::1]:1"), address("http://[::1]:1/"));
        for other in [
            "http://experts.example:1",
            "https://experts.example:2",
            "https://other:1",
        ] {
            assert_ne!(address("https://experts.example:1"), address(other));
        }
    }

    #[test]
    fn what_nothing_can_be_reached_at_is_refused() {
        for text in [
            "",
            "nonsense",
            "127.0.0.1:9",
            "ftp://127.0.0.1:9",
            "http://127.0.0.1",
            "http://a:b@c:1",
        ] {
            assert!(Address::parse(text).is_err(), "{text}");
        }
    }
}
