//! What the holder of a token may do.

/// A kind of calls. Which call needs which is in [`methods`](mod@super::methods).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Role {
    /// Look: lists, weights, scores, embeddings, tokens.
    Read,
    /// Generate text.
    Generate,
    /// Change models by training: batches, gradients, steps, parameters, adapters, checkpoints. Compute with tensors.
    Train,
    /// Load and unload models, make tokenizers, see and cancel the work of others.
    Admin,
}

impl Role {
    /// All roles.
    pub(crate) const ALL: [Self; 4] = [Self::Read, Self::Generate, Self::Train, Self::Admin];

    /// Its name in the token file.
    pub(crate) fn as_str(self) -> &'static str {
        match self {
            Self::Read => "read",
            Self::Generate => "generate",
            Self::Train => "train",
            Self::Admin => "admin",
        }
    }
}

/// A set of roles.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Roles(u8);

impl Roles {
    /// Every role: who is not asked for a token, and tokens without `roles=`.
    pub(crate) const ALL: Self = Self(0b1111);

    /// No role: who only asks for health.
    pub(crate) const NONE: Self = Self(0);

    /// Whether `role` is among them.
    pub(crate) fn contains(self, role: Role) -> bool {
        self.0 & (1 << role as u8) != 0
    }

    /// Roles from a list such as `read,generate`.
    ///
    /// # Errors
    /// A message that names what is no role.
    pub(crate) fn parse(text: &str) -> Result<Self, String> {
        let mut roles = 0;
        for name in text.split(',') {
            let role = Role::ALL.into_iter().find(|role| role.as_str() == name);
            let role = role.ok_or_else(|| {
                let known = Role::ALL.map(Role::as_str).join(", ");
                format!("\"{name}\" is not a role; roles are {known}")
            })?;
            roles |= 1 << role as u8;
        }
        Ok(Self(roles))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn roles_are_exactly_those_named() {
        let roles = Roles::parse("read,train").unwrap();
        assert!(roles.contains(Role::Read) && roles.contains(Role::Train));
        assert!(!roles.contains(Role::Generate) && !roles.contains(Role::Admin));
        assert!(Role::ALL.into_iter().all(|role| Roles::ALL.contains(role)));
        for bad in ["", "read,", "write", "Read"] {
            assert!(Roles::parse(bad).is_err(), "{bad}");
        }
    }
}
