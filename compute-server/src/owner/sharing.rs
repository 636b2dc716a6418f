//! A model in the place of another one, with the same state but other groups of layers that share their parameters.
//!
//! Names, shapes and number of a model's parameters never change: where they would, a new model takes its place when the
//! transaction is published, and what still runs on the old one ends on it.

use std::sync::Arc;
use std::time::SystemTime;

use candle_compute_proto::v1;
use candle_models::training::checkpoint::{self, Library, Writing};
use candle_models::{DecoderConfig, Model};
use serde_json::Value;

use super::handle::{NewBase, NewModel, next_id};
use super::overlay::{Operation, Overlay};
use super::saving::Saving;
use super::settings::TrainingSettings;
use super::state::Owner;
use super::{Ticket, View};
use crate::access::Tenant;
use crate::data_folder::Staged;
use crate::error::{Error, Result};
use crate::memory::Reservation;

/// What a model that is replaced leaves to its successor.
pub(crate) struct Legacy {
    saving: Saving,
    source: String,
    seed: Option<i64>,
    device: String,
    created_at: SystemTime,
    log: Vec<v1::OptimizerStep>,
    tenant: Arc<str>,
    has_moments: bool,
}

impl Owner {
    /// Stages that another model takes the place of this one; returns what that one begins with.
    ///
    /// # Errors
    /// `Precondition` while a gradient is accumulated, where the transaction has changed the weights, and for a model that
    /// has adapters; `InUse` while another transaction has something staged; `Unsupported` for weights that are not f32.
    pub(crate) fn stage_replacement(&mut self, ticket: &Ticket) -> Result<Legacy> {
        self.check_usable(ticket)?;
        let view = View::Transaction(Arc::clone(&ticket.transaction));
        self.check_replaceable(ticket, &view)?;
        let saving = self.begin_saving(&view, "")?;
        self.push(ticket, Operation::Replaced);
        Ok(Legacy {
            saving,
            source: self.shared.source.clone(),
            seed: self.shared.seed,
            device: self.shared.device.clone(),
            created_at: self.shared.created_at,
            log: self.log.clone(),
            tenant: Arc::clone(&self.shared.tenant),
            has_moments: self.optimizer.memory_bytes() > 0,
        })
    }

    fn check_replaceable(&self, ticket: &Ticket, view: &View) -> Result<()> {
        let name = &self.shared.name;
        let refuse = |message: String, hint| Err(Error::Precondition { message, hint });
        if self.overlay(view).is_some_and(Overlay::relies_on_weights) {
            let message = format!("model \"{name}\" was changed in this transaction, which \"share\" cannot follow");
            return refuse(message, "Commit first, then change \"share\".");
        }
        if !self.visible_parts(view).is_empty() {
            let message = format!("model \"{name}\" has an accumulated gradient, which does not fit another \"share\"");
            return refuse(message, "Take an optimizer step first, or delete from gradients.");
        }
        if self.shared.base.is_followed() {
            let message = format!("model \"{name}\" has adapters, which do not fit another \"share\"");
            return refuse(message, "Drop its adapters first.");
        }
        let others = self.overlays.keys().any(|other| *other != ticket.transaction);
        if others || !self.training.is_idle() {
            return Err(Error::InUse {
                message: format!("another transaction has staged something on model \"{name}\""),
                hint: "Try again once it has ended.",
            });
        }
        let parameters = self.model.decoder.parameters();
        if let Some(held) = parameters.iter().find(|parameter| parameter.dtype != "f32") {
            let message = format!(
                "\"share\" of model \"{name}\" cannot change, whose weights are held as {}; load it anew with \"share\" in its configuration",
                held.dtype
            );
            return Err(candle_models::Error::Unsupported(message).into());
        }
        Ok(())
    }

    /// Fails when something has come about that a model which takes the place of this one would not have.
    pub(super) fn check_still_replaceable(&self) -> Result<()> {
        if self.accumulated.parts.is_empty() && !self.shared.base.is_followed() {
            return Ok(());
        }
        Err(Error::Stale(format!(
            "model \"{}\" was given a gradient or an adapter after this transaction had changed its \"share\"",
            self.shared.name
        )))
    }
}

impl Legacy {
    /// Name of the tenant that loaded it.
    pub(crate) fn tenant(&self) -> &str {
        &self.tenant
    }

    /// Bytes of weights and moments with `groups` groups of layers.
    pub(crate) fn bytes_with(&self, groups: usize) -> u64 {
        let config = DecoderConfig {
            groups,
            ..self.saving.model().decoder.config().clone()
        };
        config.parameter_count() * if self.has_moments { 12 } else { 4 }
    }

    /// The model with `groups` groups of layers. Writes it to `files`, if given: from there the commit log makes it again.
    /// Takes long; called on a thread that may block.
    ///
    /// # Errors
    /// As [`candle_models::Decoder::regrouped`] and [`checkpoint::save_with`].
    pub(crate) fn succeed(
        self,
        groups: usize,
        settings: TrainingSettings,
        (tenant, memory): (Arc<Tenant>, Reservation),
        files: Option<Staged>,
    ) -> Result<NewModel> {
        let base = self.saving.base.0.clone();
        let (old, details) = (self.saving.model(), self.saving.details());
        let (decoder, sources) = old.decoder.regrouped(groups)?;
        let optimizer = self.saving.optimizer().regrouped(&sources)?;
        let mut config = old.config.as_object().cloned().unwrap_or_default();
        TrainingSettings::take(&mut config)?;
        set_share(&mut config, decoder.config());
        let shape = config.clone();
        config.extend(settings.values().clone());
        let mut model = Model {
            decoder,
            tokenizer: old.tokenizer.clone(),
            chat_template: old.chat_template.clone(),
            end_tokens: old.end_tokens.clone(),
            config: Value::Object(config),
        };
        if let Some(files) = &files {
            let writing = Writing {
                library: &Library::default(),
                cancelled: &|| false,
                progress: &|_, _| {},
            };
            checkpoint::save_with(files.path(), &model, &optimizer, details.clone(), &writing)?;
        }
        model.config = Value::Object(shape);
        Ok(NewModel {
            name: base
                .request
                .as_ref()
                .map(|request| request.name.clone())
                .unwrap_or_default(),
            adapter: None,
            source: self.source,
            seed: self.seed,
            device: self.device,
            model,
            optimizer,
            loss_scale: details.loss_scale,
            dropout_seed: details.seed,
            settings,
            log: self.log,
            tenant,
            memory,
            slot: None,
            logged: Some((next_id(), self.created_at)),
            base: files.map(|files| NewBase {
                base,
                files: Some(files),
            }),
        })
    }
}

/// Says in a configuration which layers share their parameters.
pub(crate) fn set_share(config: &mut serde_json::Map<String, Value>, shape: &DecoderConfig) {
    match shape.groups < shape.layers {
        true => config.insert("share".to_owned(), shape.groups.into()),
        false => config.remove("share"),
    };
}
