//! An adapter's factors as its model's thread computes with them, so that generations of the model and of all its adapters
//! are one batch.
//!
//! The adapter's own thread trains them in place. What others see of them is a copy, made when a generation first asks for
//! one and made anew when a change is committed. What a transaction has staged on the adapter stays with the adapter's
//! thread, and so do the transaction's generations.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use candle_models::adapters::AdapterWeights;

use super::handle::{ModelHandle, Shared};
use super::state::Owner;
use crate::error::Result;
use crate::memory::Reservation;

/// A copy of an adapter's committed factors.
pub(crate) struct Factors {
    /// The copy.
    pub(crate) weights: AdapterWeights,
    /// Number that no other copy of any adapter has had: what was computed with one copy holds for that copy alone.
    pub(crate) version: u64,
}

/// Where an adapter's thread puts the copy.
#[derive(Default)]
pub(super) struct PublishedFactors(Mutex<Published>);

#[derive(Default)]
struct Published {
    copy: Option<(Arc<Factors>, Reservation)>,
    /// Whether the model's weights hold what the adapter added: a copy adds nothing then, also before the adapter's thread
    /// knows of it.
    merged: bool,
}

impl Published {
    fn put(&mut self, weights: AdapterWeights, mut memory: Reservation) {
        let weights = match self.merged {
            true => weights.without_factors(),
            false => weights,
        };
        memory.shrink(weights.memory_bytes());
        let version = NEXT_VERSION.fetch_add(1, Ordering::Relaxed);
        self.copy = Some((Arc::new(Factors { weights, version }), memory));
    }
}

static NEXT_VERSION: AtomicU64 = AtomicU64::new(1);

impl PublishedFactors {
    fn get(&self) -> Option<Arc<Factors>> {
        self.lock().copy.as_ref().map(|(factors, _)| Arc::clone(factors))
    }

    /// Gives the memory back.
    pub(super) fn clear(&self) {
        self.lock().copy = None;
    }

    /// The adapter has been merged into its model. Called on the model's thread, where generations use the copy: those that
    /// run have it in the weights from their next token on, and not twice.
    pub(super) fn set_merged(&self) {
        let mut published = self.lock();
        published.merged = true;
        if let Some((factors, memory)) = published.copy.take() {
            published.put(factors.weights.without_factors(), memory);
        }
    }

    fn lock(&self) -> MutexGuard<'_, Published> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// An adapter in its model's batch.
#[derive(Clone)]
pub(crate) struct AppliedAdapter(Arc<Shared>);

impl AppliedAdapter {
    /// What it adds now.
    ///
    /// # Errors
    /// When the adapter was dropped meanwhile.
    pub(crate) fn factors(&self) -> Result<Arc<Factors>> {
        let factors = self.0.factors.get().filter(|_| self.0.is_running());
        factors.ok_or_else(|| self.0.gone())
    }

    /// Number of the loaded adapter, which no other has had.
    pub(super) fn id(&self) -> u64 {
        self.0.id
    }

    /// As [`factors`](Self::factors), for a look alone.
    pub(super) fn check(&self) -> Result<()> {
        self.factors().map(drop)
    }
}

impl ModelHandle {
    /// An adapter as its model's thread uses it.
    ///
    /// # Errors
    /// `Memory` for the copy of its factors; `Unloaded`.
    pub(crate) async fn applied(&self) -> Result<AppliedAdapter> {
        if self.facts().factors.get().is_none() {
            self.call(Owner::publish_factors).await?;
        }
        Ok(AppliedAdapter(self.shared()))
    }
}

impl Owner {
    /// Makes the committed factors known, unless they are.
    fn publish_factors(&mut self) -> Result<()> {
        if self.shared.factors.get().is_some() {
            return Ok(());
        }
        let weights = AdapterWeights::of(&self.model.decoder)?;
        let memory = self
            .budget
            .reserve("the factors of an adapter in its model's batch", weights.memory_bytes())?;
        self.shared.factors.lock().put(weights, memory);
        Ok(())
    }

    /// Makes changed factors known, if the old ones were. Generations that run go on with them at their next token.
    pub(super) fn republish_factors(&mut self) {
        // The copy has the size of the one before, or less where the adapter was merged.
        let mut published = self.shared.factors.lock();
        let Some((_, memory)) = published.copy.take() else {
            return;
        };
        match AdapterWeights::of(&self.model.decoder) {
            Ok(weights) => published.put(weights, memory),
            // The next generation tries again; those that run end.
            Err(error) => {
                tracing::error!(model = %self.shared.name, %error, "copying the factors of an adapter failed")
            }
        }
    }
}
