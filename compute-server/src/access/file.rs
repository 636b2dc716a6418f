//! The token file: `NAME TOKEN [KEY=VALUE]…`, one token a line.

use sha2::{Digest, Sha256};
use subtle::{Choice, ConditionallySelectable, ConstantTimeEq};

use super::Roles;
use super::tenant::Quotas;
use crate::config::Bytes;
use crate::error::{Error, Result};

/// Keys of a line.
const KEYS: &str = "roles, requests_per_second, tokens_per_minute, concurrent, memory";

/// The tokens that are accepted. Only their digests are kept.
#[derive(Debug)]
pub(super) struct Tokens {
    entries: Vec<Entry>,
}

/// One line of the file.
#[derive(Debug)]
pub(super) struct Entry {
    /// The holder's name.
    pub(super) tenant: String,
    /// What this token allows.
    pub(super) roles: Roles,
    /// What its tenant may use; the lines of one tenant together say it.
    pub(super) quotas: Quotas,
    digest: [u8; 32],
}

impl Tokens {
    /// Takes the text of a token file apart. Empty lines and lines that start with `#` are skipped.
    ///
    /// # Errors
    /// A message that names the line, never its token.
    pub(super) fn parse(text: &str) -> Result<Self, String> {
        let mut entries: Vec<Entry> = Vec::new();
        for (number, line) in text.lines().enumerate() {
            let line = line.trim();
            if line.is_empty() || line.starts_with('#') {
                continue;
            }
            let entry = parse_line(line).map_err(|reason| format!("line {}: {reason}", number + 1))?;
            if entries.iter().any(|known| known.digest == entry.digest) {
                return Err(format!("line {}: it repeats the token of another line", number + 1));
            }
            entries.push(entry);
        }
        if entries.is_empty() {
            return Err("it holds no token".to_owned());
        }
        let tokens = Self { entries };
        for (tenant, _) in tokens.quotas()? {
            if tenant.chars().count() > crate::names::MAX_NAME_CHARACTERS {
                return Err(format!("the name \"{tenant}\" is too long"));
            }
        }
        Ok(tokens)
    }

    /// Every tenant with its quotas.
    ///
    /// # Errors
    /// A message when the lines of one tenant contradict each other.
    pub(super) fn quotas(&self) -> Result<Vec<(&str, Quotas)>, String> {
        let mut tenants: Vec<(&str, Quotas)> = Vec::new();
        for entry in &self.entries {
            let Some((name, quotas)) = tenants.iter_mut().find(|(name, _)| *name == entry.tenant) else {
                tenants.push((&entry.tenant, entry.quotas));
                continue;
            };
            let new = entry.quotas;
            let agreed = join(&mut quotas.requests_per_second, new.requests_per_second)
                && join(&mut quotas.tokens_per_minute, new.tokens_per_minute)
                && join(&mut quotas.concurrent, new.concurrent)
                && join(&mut quotas.memory, new.memory);
            if !agreed {
                return Err(format!(
                    "the lines of \"{name}\" give different values for the same quota"
                ));
            }
        }
        Ok(tenants)
    }

    /// The line of the token in an `authorization` header. Takes the same time whichever token it is.
    ///
    /// # Errors
    /// `Unauthenticated`.
    pub(super) fn find(&self, authorization: Option<&str>) -> Result<&Entry> {
        let header = authorization.ok_or(Error::Unauthenticated("this server asks for a bearer token"))?;
        let token = header
            .split_once(' ')
            .filter(|(scheme, _)| scheme.eq_ignore_ascii_case("bearer"));
        let (_, token) = token.ok_or(Error::Unauthenticated(
            "the authorization header is not \"Bearer TOKEN\"",
        ))?;
        let presented = digest(token.trim());
        let (mut found, mut index) = (Choice::from(0), 0u32);
        for (number, entry) in (0u32..).zip(&self.entries) {
            let equal = presented.ct_eq(&entry.digest);
            index.conditional_assign(&number, equal);
            found |= equal;
        }
        match bool::from(found) {
            true => Ok(&self.entries[index as usize]),
            false => Err(Error::Unauthenticated("the bearer token is not known to this server")),
        }
    }
}

/// Adds what another line says; false when it says something else.
fn join<T: PartialEq + Copy>(known: &mut Option<T>, new: Option<T>) -> bool {
    match (*known, new) {
        (Some(known), Some(new)) => known == new,
        (None, Some(_)) => {
            *known = new;
            true
        }
        (_, None) => true,
    }
}

fn parse_line(line: &str) -> Result<Entry, String> {
    let mut words = line.split_whitespace();
    let (Some(name), Some(token)) = (words.next(), words.next()) else {
        return Err("it is not of the form NAME TOKEN [KEY=VALUE]…".to_owned());
    };
    let mut entry = Entry {
        tenant: name.to_owned(),
        roles: Roles::ALL,
        quotas: Quotas::default(),
        digest: digest(token),
    };
    let mut seen: Vec<&str> = Vec::new();
    for (position, word) in words.enumerate() {
        // What is no KEY=VALUE is not shown: it may be a token that was pasted with a space in it.
        let (key, value) = word
            .split_once('=')
            .filter(|(key, _)| KEYS.split(", ").any(|known| known == *key))
            .ok_or_else(|| format!("its word {} is not KEY=VALUE with a key out of {KEYS}", position + 3))?;
        if seen.contains(&key) {
            return Err(format!("{key} is given twice"));
        }
        seen.push(key);
        set(&mut entry, key, value).map_err(|reason| format!("{key}: {reason}"))?;
    }
    Ok(entry)
}

fn set(entry: &mut Entry, key: &str, value: &str) -> Result<(), String> {
    let quotas = &mut entry.quotas;
    match key {
        "roles" => entry.roles = Roles::parse(value)?,
        "requests_per_second" => quotas.requests_per_second = Some(rate(value)?),
        "tokens_per_minute" => quotas.tokens_per_minute = Some(rate(value)?),
        "concurrent" => {
            let count = value.parse::<u64>().ok().filter(|&count| count > 0);
            quotas.concurrent = Some(count.ok_or_else(|| format!("\"{value}\" is not a whole number above 0"))?);
        }
        _ => quotas.memory = Some(value.parse::<Bytes>()?.0),
    }
    Ok(())
}

fn rate(value: &str) -> Result<f64, String> {
    let number = value.parse::<f64>().ok();
    let number = number.filter(|number| number.is_finite() && *number > 0.0);
    number.ok_or_else(|| format!("\"{value}\" is not a number above 0"))
}

fn digest(token: &str) -> [u8; 32] {
    Sha256::digest(token.as_bytes()).into()
}

#[cfg(test)]
mod tests {
    use super::super::Role;
    use super::*;

    #[test]
    fn a_token_has_its_holder() {
        let tokens = Tokens::parse("# team\nann secret-1\n\nbob secret-2\n").unwrap();
        assert_eq!(tokens.find(Some("Bearer secret-1")).unwrap().tenant, "ann");
        assert_eq!(tokens.find(Some("bearer secret-2")).unwrap().tenant, "bob");
        assert_eq!(tokens.find(Some("Bearer secret-1")).unwrap().roles, Roles::ALL);
        for refused in [
            None,
            Some("secret-1"),
            Some("Bearer secret"),
            Some("Bearer "),
            Some("Basic secret-1"),
        ] {
            assert!(matches!(tokens.find(refused), Err(Error::Unauthenticated(_))));
        }
    }

    #[test]
    fn roles_are_the_tokens_and_quotas_the_tenants() {
        let text = "ann t1 roles=read concurrent=4 memory=2GiB\nann t2 requests_per_second=0.5 tokens_per_minute=600\n";
        let tokens = Tokens::parse(text).unwrap();
        let first = tokens.find(Some("Bearer t1")).unwrap();
        assert!(first.roles.contains(Role::Read) && !first.roles.contains(Role::Generate));
        assert_eq!(tokens.find(Some("Bearer t2")).unwrap().roles, Roles::ALL);
        let quotas = Quotas {
            requests_per_second: Some(0.5),
            tokens_per_minute: Some(600.0),
            concurrent: Some(4),
            memory: Some(2 << 30),
        };
        assert_eq!(tokens.quotas().unwrap(), [("ann", quotas)]);
    }

    #[test]
    fn a_bad_file_is_refused_without_showing_tokens() {
        let cases = [
            ("", "no token"),
            ("# nothing\n", "no token"),
            ("only-a-secret\n", "line 1"),
            ("a b secret\n", "line 1: its word 3"),
            ("a b\n\nc d secret=1\n", "line 3: its word 3"),
            ("a secret\nb secret\n", "line 2"),
            ("a secret roles=read,write\n", "\"write\" is not a role"),
            ("a secret concurrent=0\n", "line 1: concurrent"),
            ("a secret concurrent=1 concurrent=1\n", "twice"),
            ("a secret requests_per_second=inf\n", "requests_per_second"),
            ("a secret tokens_per_minute=-1\n", "tokens_per_minute"),
            ("a secret memory=1x\n", "memory"),
            ("a secret1 concurrent=1\na secret2 concurrent=2\n", "different values"),
        ];
        for (text, named) in cases {
            let reason = Tokens::parse(text).unwrap_err();
            assert!(!reason.contains("secret") && reason.contains(named), "{reason}");
        }
    }
}
