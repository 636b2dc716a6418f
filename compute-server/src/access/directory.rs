//! All tenants, and the tokens by which they are known. A changed token file is read again at the next call.

use std::collections::HashMap;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use axum::http::{HeaderMap, header};

use super::file::Tokens;
use super::{Caller, Roles, Tenant};
use crate::error::{Error, Result};
use crate::memory::MemoryBudget;
use crate::watched_file::WatchedFile;

/// Tenants and tokens.
pub(crate) struct Directory {
    asks_for_tokens: bool,
    memory: Arc<MemoryBudget>,
    state: Mutex<State>,
}

struct State {
    file: Option<WatchedFile>,
    /// None where nobody is asked for a token.
    tokens: Option<Arc<Tokens>>,
    /// Every tenant there has been: what it used, and the models it loaded, outlive its line in the file.
    tenants: HashMap<String, Arc<Tenant>>,
}

impl Directory {
    /// The tenants of a token file, if there is one. `memory` is the server's.
    ///
    /// # Errors
    /// `Io`, or `InvalidArgument` that names the line, never its token.
    pub(crate) fn open(file: Option<PathBuf>, memory: &Arc<MemoryBudget>) -> Result<Self> {
        let directory = Self {
            asks_for_tokens: file.is_some(),
            memory: Arc::clone(memory),
            state: Mutex::new(State {
                file: file.map(|path| WatchedFile::new(path, "token file")),
                tokens: None,
                tenants: HashMap::new(),
            }),
        };
        directory.refresh(&mut directory.lock())?;
        Ok(directory)
    }

    /// Whether callers are asked for tokens.
    pub(crate) fn asks_for_tokens(&self) -> bool {
        self.asks_for_tokens
    }

    /// The caller of a request with these headers.
    ///
    /// # Errors
    /// `Unauthenticated`.
    pub(crate) fn caller(&self, headers: &HeaderMap) -> Result<Caller> {
        let authorization = headers.get(header::AUTHORIZATION);
        let authorization = authorization.and_then(|value| value.to_str().ok());
        let mut state = self.lock();
        if let Err(error) = self.refresh(&mut state) {
            tracing::error!(%error, "the tokens known before stay in use");
        }
        let (name, roles) = match state.tokens.clone() {
            Some(tokens) => {
                let entry = tokens.find(authorization)?;
                (entry.tenant.clone(), entry.roles)
            }
            None => (String::new(), Roles::ALL),
        };
        Ok(Caller {
            tenant: self.tenant_in(&mut state, &name),
            roles,
            connection: None,
            deadline: super::caller::deadline(headers),
        })
    }

    /// The tenant called `name`, made if need be: models that are recovered may belong to one that has no token any more.
    pub(crate) fn tenant(&self, name: &str) -> Arc<Tenant> {
        self.tenant_in(&mut self.lock(), name)
    }

    fn tenant_in(&self, state: &mut State, name: &str) -> Arc<Tenant> {
        if let Some(tenant) = state.tenants.get(name) {
            return Arc::clone(tenant);
        }
        let tenant = Arc::new(Tenant::new(name, &self.memory));
        state.tenants.insert(name.to_owned(), Arc::clone(&tenant));
        tenant
    }

    /// Reads the file if it has changed.
    ///
    /// # Errors
    /// What is wrong with it, once for every change; the tokens known before stay in use.
    fn refresh(&self, state: &mut State) -> Result<()> {
        let Some(file) = &mut state.file else { return Ok(()) };
        let Some(text) = file.changed()? else { return Ok(()) };
        let what = file.to_string();
        let taken = Tokens::parse(&text).and_then(|tokens| self.take(state, tokens));
        taken.map_err(|reason| Error::invalid(format!("{what}: {reason}")))
    }

    /// Uses `tokens` from now on.
    fn take(&self, state: &mut State, tokens: Tokens) -> Result<(), String> {
        let quotas = tokens.quotas()?;
        for tenant in state.tenants.values() {
            if !quotas.iter().any(|(name, _)| **name == **tenant.name()) {
                tenant.set_quotas(super::tenant::Quotas::default());
            }
        }
        for (name, quotas) in quotas {
            self.tenant_in(state, name).set_quotas(quotas);
        }
        if state.tokens.is_some() {
            tracing::info!("the token file has changed; its tokens are in use");
        }
        state.tokens = Some(Arc::new(tokens));
        Ok(())
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cache_memory::CacheMemory;

    fn bearer(token: &str) -> HeaderMap {
        let value = format!("Bearer {token}").parse().unwrap();
        HeaderMap::from_iter([(header::AUTHORIZATION, value)])
    }

    #[test]
    fn a_changed_file_counts_from_the_next_call_and_a_bad_one_not_at_all() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("tokens");
        let write = |text: &str| std::fs::write(&path, text).unwrap();
        write("ann one\n");
        let directory = Directory::open(Some(path.clone()), &MemoryBudget::new(1, CacheMemory::new(0, 0))).unwrap();
        let name = |token: &str| {
            let caller = directory.caller(&bearer(token));
            caller.map(|caller| caller.name().to_string())
        };
        assert_eq!(name("one").unwrap(), "ann");
        // Of the same length, within the same moment.
        write("bob two\n");
        assert!(name("one").is_err());
        assert_eq!(name("two").unwrap(), "bob");
        for bad in ["", "bob\n", "bob two roles=nothing\n"] {
            write(bad);
            assert_eq!(name("two").unwrap(), "bob");
        }
        std::fs::remove_file(&path).unwrap();
        assert_eq!(name("two").unwrap(), "bob");
        write("cid three concurrent=1\n");
        assert_eq!(name("three").unwrap(), "cid");
        assert!(name("two").is_err());
    }

    #[test]
    fn a_tenant_keeps_what_it_used_when_the_file_changes() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("tokens");
        std::fs::write(&path, "ann one concurrent=1\n").unwrap();
        let directory = Directory::open(Some(path.clone()), &MemoryBudget::new(1, CacheMemory::new(0, 0))).unwrap();
        directory.caller(&bearer("one")).unwrap().tenant.begin_work().unwrap();
        std::fs::write(&path, "ann other concurrent=1 roles=read\n").unwrap();
        let caller = directory.caller(&bearer("other")).unwrap();
        assert!(caller.tenant.begin_work().is_err());
        assert!(!caller.roles.contains(super::super::Role::Admin));
    }

    #[test]
    fn a_bad_file_keeps_the_server_from_starting() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("tokens");
        let open = || {
            Directory::open(Some(path.clone()), &MemoryBudget::new(1, CacheMemory::new(0, 0)))
                .err()
                .unwrap()
                .to_string()
        };
        assert!(open().contains("tokens"));
        std::fs::write(&path, "ann a\nbob\n").unwrap();
        assert!(open().contains("line 2"));
    }
}
