//! How expert servers are let know who asks, and how they are known: the tokens that are shown to them, and the authorities
//! that sign their certificates. Both are options of this server and no part of a model, whose configuration everybody may
//! read. A token belongs to an address: whoever loads a model with another one does not get it sent there.

use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use tonic::metadata::{Ascii, MetadataValue};

use super::address::Address;
use crate::connections::check_certificates;
use crate::error::{Error, Result};
use crate::watched_file::WatchedFile;

/// Where Debian keeps the authorities that the system trusts.
const SYSTEM_AUTHORITIES: &str = "/etc/ssl/certs/ca-certificates.crt";

/// Tokens and authorities for expert servers, as the files hold them now.
pub(crate) struct ExpertAccess(Mutex<State>);

struct State {
    token_file: Option<WatchedFile>,
    tokens: HashMap<Address, MetadataValue<Ascii>>,
    ca_file: Option<WatchedFile>,
    authorities: Authorities,
}

/// Authorities that may have signed the certificate of an expert server.
#[derive(Clone)]
pub(super) struct Authorities {
    /// Another one for others.
    pub(super) version: u64,
    /// In PEM; none for those that the system trusts.
    given: Option<Arc<str>>,
}

impl ExpertAccess {
    /// With the files of `--expert-token-file` and `--expert-ca-file`, where they are given.
    ///
    /// # Errors
    /// `Io`, or `InvalidArgument` that names file and line, never a token.
    pub(crate) fn open(token_file: Option<PathBuf>, ca_file: Option<PathBuf>) -> Result<Arc<Self>> {
        let file = |path: Option<PathBuf>, what| path.map(|path| WatchedFile::new(path, what));
        let mut state = State {
            token_file: file(token_file, "file of --expert-token-file"),
            tokens: HashMap::new(),
            ca_file: file(ca_file, "file of --expert-ca-file"),
            authorities: Authorities {
                version: 0,
                given: None,
            },
        };
        state.refresh_tokens()?;
        state.refresh_authorities()?;
        Ok(Arc::new(Self(Mutex::new(state))))
    }

    /// The value of the `authorization` header for the server at an address, if it has a token.
    pub(super) fn authorization(&self, address: &Address) -> Option<MetadataValue<Ascii>> {
        let mut state = self.lock();
        if let Err(error) = state.refresh_tokens() {
            tracing::error!(%error, "the tokens for expert servers that were known before stay in use");
        }
        state.tokens.get(address).cloned()
    }

    /// The authorities that are trusted.
    pub(super) fn authorities(&self) -> Authorities {
        let mut state = self.lock();
        if let Err(error) = state.refresh_authorities() {
            tracing::error!(%error, "the authorities for expert servers that were known before stay in use");
        }
        state.authorities.clone()
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Authorities {
    /// Their certificates in PEM.
    ///
    /// # Errors
    /// The file that the system keeps them in cannot be read.
    pub(super) fn pem(&self) -> std::result::Result<Arc<str>, String> {
        match &self.given {
            Some(given) => Ok(Arc::clone(given)),
            None => match std::fs::read_to_string(Path::new(SYSTEM_AUTHORITIES)) {
                Ok(text) => Ok(text.into()),
                Err(error) => Err(format!(
                    "the authorities of the system cannot be read: {SYSTEM_AUTHORITIES}: {error}"
                )),
            },
        }
    }
}

impl State {
    fn refresh_tokens(&mut self) -> Result<()> {
        let Some(file) = &mut self.token_file else {
            return Ok(());
        };
        if let Some(text) = file.changed()? {
            let tokens = parse(&text).map_err(|reason| Error::invalid(format!("{file}: {reason}")))?;
            self.tokens = tokens;
        }
        Ok(())
    }

    fn refresh_authorities(&mut self) -> Result<()> {
        let Some(file) = &mut self.ca_file else { return Ok(()) };
        if let Some(text) = file.changed()? {
            check_certificates(&text).map_err(|reason| Error::invalid(format!("{file}: {reason}")))?;
            self.authorities = Authorities {
                version: self.authorities.version + 1,
                given: Some(text.into()),
            };
        }
        Ok(())
    }
}

/// Takes the text of a token file apart: `ENDPOINT TOKEN`, one server a line. Empty lines and lines that start with `#` are
/// skipped.
///
/// # Errors
/// A message that names the line, never its words.
fn parse(text: &str) -> std::result::Result<HashMap<Address, MetadataValue<Ascii>>, String> {
    let mut tokens = HashMap::new();
    for (number, line) in text.lines().enumerate() {
        let line = line.trim();
        if line.is_empty() || line.starts_with('#') {
            continue;
        }
        let refuse = |reason: &str| Err(format!("line {}: {reason}", number + 1));
        let mut words = line.split_whitespace();
        let (Some(endpoint), Some(token), None) = (words.next(), words.next(), words.next()) else {
            return refuse("it is not of the form ENDPOINT TOKEN");
        };
        let Ok(address) = Address::parse(endpoint) else {
            return refuse("its first word is neither http://HOST:PORT nor https://HOST:PORT");
        };
        let printable = token.bytes().all(|byte| byte.is_ascii_graphic());
        let Some(mut value) = MetadataValue::try_from(format!("Bearer {token}"))
            .ok()
            .filter(|_| printable)
        else {
            return refuse("its token has other characters than printable ASCII");
        };
        value.set_sensitive(true);
        if tokens.insert(address, value).is_some() {
            return refuse("it repeats the address of another line");
        }
    }
    Ok(tokens)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_token_is_shown_to_its_server_alone_and_counts_as_the_file_is_now() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("tokens");
        let write = |text: &str| std::fs::write(&path, text).unwrap();
        write("# experts\nhttps://a:1 one\n\nhttp://b:1 two\n");
        let access = ExpertAccess::open(Some(path.clone()), None).unwrap();
        let shown = |endpoint: &str| {
            let value = access.authorization(&Address::parse(endpoint).unwrap());
            value.map(|value| value.to_str().unwrap().to_owned())
        };
        assert_eq!(shown("https://A:1/").unwrap(), "Bearer one");
        assert_eq!(shown("http://b:1").unwrap(), "Bearer two");
        for other in ["http://a:1", "https://a:2", "https://b:1", "https://c:1"] {
            assert_eq!(shown(other), None, "{other}");
        }
        write("https://a:1 new\n");
        assert_eq!(shown("https://a:1").unwrap(), "Bearer new");
        assert_eq!(shown("http://b:1"), None);
        for bad in ["https://a:1\n", "https://a:1 x\nhttps://a:1 y\n"] {
            write(bad);
            assert_eq!(shown("https://a:1").unwrap(), "Bearer new");
        }
        write("");
        assert_eq!(shown("https://a:1"), None);
    }

    #[test]
    fn a_bad_file_is_refused_without_showing_tokens() {
        for (text, named) in [
            ("secret\n", "line 1"),
            ("\nsecret https://a:1\n", "line 2"),
            ("https://a:1 secret more\n", "line 1"),
            ("https://a:1 sécret\n", "ASCII"),
            ("https://a:1 secret\nhttps://A:1 secret\n", "line 2"),
        ] {
            let reason = parse(text).unwrap_err();
            assert!(!reason.contains("cret") && reason.contains(named), "{reason}");
        }
    }

    #[test]
    fn files_that_cannot_serve_keep_the_server_from_starting() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("file");
        let open = |tokens: bool| {
            let [token_file, ca_file] = [tokens.then(|| path.clone()), (!tokens).then(|| path.clone())];
            ExpertAccess::open(token_file, ca_file).err().unwrap().to_string()
        };
        assert!(open(true).contains("--expert-token-file"));
        assert!(open(false).contains("--expert-ca-file"));
        std::fs::write(&path, "nothing\n").unwrap();
        assert!(open(true).contains("line 1"));
        assert!(open(false).contains("no certificate"));
    }
}
