//! Bearer tokens.

use std::path::Path;

use sha2::{Digest, Sha256};
use subtle::{Choice, ConditionallySelectable, ConstantTimeEq};

use crate::error::{Error, Result};

/// The tokens that are accepted, each with the name of its holder. Only digests are kept.
pub(crate) struct Tokens {
    entries: Vec<(String, [u8; 32])>,
}

impl Tokens {
    /// Reads a file of `NAME TOKEN` lines. Empty lines and lines that start with `#` are skipped.
    ///
    /// # Errors
    /// `InvalidArgument` that names the line, never its token.
    pub(crate) fn read(path: &Path) -> Result<Self> {
        let what = || format!("the token file {}", path.display());
        let text = std::fs::read_to_string(path).map_err(|error| Error::io(what(), error))?;
        let tokens = Self::parse(&text).map_err(|reason| Error::invalid(format!("{}: {reason}", what())))?;
        Ok(tokens)
    }

    fn parse(text: &str) -> Result<Self, String> {
        let mut entries: Vec<(String, [u8; 32])> = Vec::new();
        for (number, line) in text.lines().enumerate() {
            let line = line.trim();
            if line.is_empty() || line.starts_with('#') {
                continue;
            }
            let mut words = line.split_whitespace();
            let (Some(name), Some(token), None) = (words.next(), words.next(), words.next()) else {
                return Err(format!("line {} is not of the form NAME TOKEN", number + 1));
            };
            let digest = digest(token);
            if entries.iter().any(|(_, known)| *known == digest) {
                return Err(format!("line {} repeats the token of another line", number + 1));
            }
            entries.push((name.to_owned(), digest));
        }
        match entries.is_empty() {
            true => Err("it holds no token".to_owned()),
            false => Ok(Self { entries }),
        }
    }

    /// The holder of the token in an `authorization` header. Takes the same time whichever token it is.
    ///
    /// # Errors
    /// `Unauthenticated`.
    pub(crate) fn holder(&self, authorization: Option<&str>) -> Result<&str> {
        let header = authorization.ok_or(Error::Unauthenticated("this server asks for a bearer token"))?;
        let token = header
            .split_once(' ')
            .filter(|(scheme, _)| scheme.eq_ignore_ascii_case("bearer"));
        let (_, token) = token.ok_or(Error::Unauthenticated(
            "the authorization header is not \"Bearer TOKEN\"",
        ))?;
        let presented = digest(token.trim());
        let (mut found, mut index) = (Choice::from(0), 0u32);
        for (number, (_, known)) in (0u32..).zip(&self.entries) {
            let equal = presented.ct_eq(known);
            index.conditional_assign(&number, equal);
            found |= equal;
        }
        match bool::from(found) {
            true => Ok(&self.entries[index as usize].0),
            false => Err(Error::Unauthenticated("the bearer token is not known to this server")),
        }
    }
}

fn digest(token: &str) -> [u8; 32] {
    Sha256::digest(token.as_bytes()).into()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_token_has_its_holder() {
        let tokens = Tokens::parse("# team\nann secret-1\n\nbob secret-2\n").unwrap();
        assert_eq!(tokens.holder(Some("Bearer secret-1")).unwrap(), "ann");
        assert_eq!(tokens.holder(Some("bearer secret-2")).unwrap(), "bob");
        for refused in [
            None,
            Some("secret-1"),
            Some("Bearer secret"),
            Some("Bearer "),
            Some("Basic secret-1"),
        ] {
            assert!(matches!(tokens.holder(refused), Err(Error::Unauthenticated(_))));
        }
    }

    #[test]
    fn a_bad_file_is_refused_without_showing_tokens() {
        for text in ["", "# nothing\n", "only-a-token\n", "a b c\n", "a secret\nb secret\n"] {
            let reason = Tokens::parse(text).err().unwrap();
            assert!(!reason.contains("secret"), "{reason}");
        }
    }
}
