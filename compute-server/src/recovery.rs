//! Making the models of the commit log again when the server starts.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime};

use candle_compute_proto::v1;

use crate::app::App;
use crate::commit_log::{LogBase, LoggedChanges, LoggedModel, Recovered, origin};
use crate::error::{Error, Result};
use crate::names::ModelKey;
use crate::owner::{ModelHandle, NewModel};
use crate::registry::Unavailable;
use crate::services::{Loading, Located, load, make_adapter, parse_config};
use crate::{devices, sources};

/// How often progress is logged.
const PROGRESS: Duration = Duration::from_secs(5);

/// A model with its adapters: what they computed rests on the weights that the model had at the time.
#[derive(Default)]
struct Group {
    model: Option<(LoggedModel, LogBase)>,
    adapters: Vec<(LoggedModel, LogBase)>,
}

/// A model or adapter that is being made again.
struct Member {
    logged: LoggedModel,
    handle: ModelHandle,
    /// Number of its changes that were applied.
    done: usize,
    /// Whether all steps came out as they did at first.
    exact: bool,
}

/// Makes the models that `recovered` describes again. One that cannot be made keeps its name and its place in the log, and
/// does not keep the others from being made.
pub(crate) async fn recover(app: &Arc<App>, recovered: Recovered) {
    for (transaction, writes) in &recovered.published {
        app.transactions.remember(&transaction.as_str().into(), *writes);
    }
    let start = Instant::now();
    let mut groups: BTreeMap<u64, Group> = BTreeMap::new();
    for model in recovered.models {
        match model.base() {
            Ok(base) if base.of != 0 => groups.entry(base.of).or_default().adapters.push((model, base)),
            Ok(base) => {
                let id = model.id;
                groups.entry(id).or_default().model = Some((model, base));
            }
            Err(error) => {
                let key = ModelKey::new(&format!("model {} of the commit log", model.id), "");
                give_up(app, key, vec![model.id], &LogBase::default(), &error);
            }
        }
    }
    let total = groups.len();
    for (_, group) in groups {
        recover_group(app, group).await;
    }
    if total > 0 {
        let seconds = start.elapsed().as_secs_f64();
        tracing::info!(models = total, seconds, "the commit log is replayed");
    }
}

async fn recover_group(app: &Arc<App>, group: Group) {
    let Some((logged, base)) = group.model else {
        // Its model is unavailable, and keeps it from being used.
        return;
    };
    let mut ids = vec![logged.id];
    ids.extend(group.adapters.iter().map(|(adapter, _)| adapter.id));
    let key = ModelKey::new(&base.request.clone().unwrap_or_default().name, "");
    let lost = logged
        .lost
        .iter()
        .chain(group.adapters.iter().filter_map(|(adapter, _)| adapter.lost.as_ref()));
    let lost = lost.map(|lost| Error::Internal(lost.reason.clone())).next();
    let begun = match lost {
        Some(error) => Err(error),
        None => begin(app, &logged, &base).await,
    };
    let handle = match begun {
        Ok(handle) => handle,
        Err(error) => return give_up(app, key, ids, &base, &error),
    };
    let mut members = vec![Member::new(logged, handle.clone())];
    for (adapter, adapter_base) in group.adapters {
        match begin_adapter(app, &handle, &adapter, &adapter_base).await {
            Ok(handle) => members.push(Member::new(adapter, handle)),
            Err(error) => {
                let request = adapter_base.adapter.clone().unwrap_or_default();
                give_up(
                    app,
                    ModelKey::new(&request.model, &request.name),
                    vec![adapter.id],
                    &base,
                    &error,
                );
            }
        }
    }
    match replay(app, &mut members).await {
        Ok(()) => members.into_iter().for_each(|member| member.publish(app)),
        Err(error) => {
            members.iter().for_each(|member| member.handle.unload());
            give_up(app, key, ids, &base, &error);
        }
    }
}

impl Member {
    fn new(logged: LoggedModel, handle: ModelHandle) -> Self {
        Self {
            logged,
            handle,
            done: 0,
            exact: true,
        }
    }

    fn publish(self, app: &App) {
        let key = self.handle.key().to_string();
        let present = app.log.as_ref().map_or("", |log| log.simd());
        let mut before = self.logged.changes.iter().map(|changes| changes.simd.as_str());
        if let Some(before) = before.find(|&simd| simd != present) {
            tracing::warn!(
                model = key,
                before,
                now = present,
                "the model was trained with another variant of the kernels: its weights may differ from the committed ones in the last bits"
            );
        } else if !self.exact {
            tracing::warn!(
                model = key,
                "a gradient did not come out as it was committed: the processor or the program has changed, and weights may differ in the last bits"
            );
        }
        tracing::info!(
            model = key,
            commits = self.done,
            "made a model again from the commit log"
        );
        app.registry.insert(self.handle);
    }
}

/// Notes a model or adapter that could not be made, with the numbers that are dropped with it.
fn give_up(app: &App, key: ModelKey, ids: Vec<u64>, base: &LogBase, error: &Error) {
    let reason = error.to_string();
    tracing::error!(model = %key, reason, "a model could not be made again");
    let request = base.request.clone().unwrap_or_default();
    let row = v1::Model {
        name: key.model.clone(),
        source: request.source,
        config_json: "{}".to_owned(),
        dtype: request.dtype,
        device: request.device,
        status: "unavailable".to_owned(),
        created_at: base.created_at,
        ..Default::default()
    };
    app.registry.add_unavailable(key, Unavailable { ids, row, reason });
}

fn missing() -> Error {
    Error::Internal("the commit log does not say how the model began".to_owned())
}

/// The model as its base has it.
async fn begin(app: &Arc<App>, logged: &LoggedModel, base: &LogBase) -> Result<ModelHandle> {
    let request = base.request.clone().ok_or_else(missing)?;
    let device = match request.device.as_str() {
        "" => &app.config.device,
        given => given,
    };
    let device = devices::open(device)?;
    let source = match base.origin.clone().and_then(|origin| origin.kind).ok_or_else(missing)? {
        origin::Kind::Created(tokenizer) => Located::Tokenizer(tokenizer),
        origin::Kind::Files(digest) => Located::Files(unchanged(app, &request.source, digest).await?),
        origin::Kind::Saved(folder) => saved(app, &folder)?,
    };
    let loading = Loading {
        config: parse_config(&request.config_json)?,
        request,
        source,
        device,
        tenant: app.tenants.tenant(&base.tenant),
        staged_tokenizer: None,
    };
    let loader = Arc::clone(app);
    start(app, logged, base, move || load(&loader, loading)).await
}

/// A state that was saved as a base.
fn saved(app: &App, folder: &str) -> Result<Located> {
    let log = app.log.as_ref().ok_or_else(missing)?;
    Ok(Located::Checkpoint(log.base_path(folder)))
}

/// An adapter as its base has it.
async fn begin_adapter(
    app: &Arc<App>,
    model: &ModelHandle,
    logged: &LoggedModel,
    base: &LogBase,
) -> Result<ModelHandle> {
    let request = base.adapter.clone().ok_or_else(missing)?;
    let source = match base.origin.clone().and_then(|origin| origin.kind).ok_or_else(missing)? {
        origin::Kind::Created(_) => Located::Nothing,
        origin::Kind::Files(digest) => Located::Files(unchanged(app, &request.source, digest).await?),
        origin::Kind::Saved(folder) => saved(app, &folder)?,
    };
    let (maker, model, tenant) = (Arc::clone(app), model.clone(), app.tenants.tenant(&base.tenant));
    start(app, logged, base, move || {
        make_adapter(&maker, model, request, source, tenant)
    })
    .await
}

/// Gives what `load` loads a thread, under the number that it has in the log.
async fn start(
    app: &Arc<App>,
    logged: &LoggedModel,
    base: &LogBase,
    load: impl FnOnce() -> Result<NewModel> + Send + 'static,
) -> Result<ModelHandle> {
    let slot = app.model_slot()?;
    let created_at = base.created_at.and_then(|time| SystemTime::try_from(time).ok());
    let loaded = tokio::task::spawn_blocking(load).await;
    let mut new = loaded.map_err(|error| Error::Internal(format!("loading failed: {error}")))??;
    new.slot = Some(slot);
    if base.adapter.is_none() {
        new.seed = base.seed;
    }
    new.logged = Some((logged.id, created_at.unwrap_or_else(SystemTime::now)));
    new.base = None;
    ModelHandle::start(new, app.config.limits, &app.expert_access)
}

/// The files of a source, if they are those that the model was loaded from.
async fn unchanged(app: &App, source: &str, digest: String) -> Result<std::path::PathBuf> {
    let path = sources::locate(&app.config.models_dir, std::path::Path::new(source))?;
    let found = path.clone();
    let present = tokio::task::spawn_blocking(move || sources::begin_digest(&found).finish(&found)).await;
    let present = present.map_err(|error| Error::Internal(format!("reading failed: {error}")))??;
    match present == digest {
        true => Ok(path),
        false => Err(Error::invalid(format!(
            "the files of its source {source} have changed since it was loaded (SHA-256 {present}, not {digest}); put them back"
        ))),
    }
}

/// Applies what was committed since the bases, frame by frame.
async fn replay(app: &App, members: &mut [Member]) -> Result<()> {
    let all = || members.iter().flat_map(|member| &member.logged.changes);
    let total: u64 = all().map(|changes| changes.tokens).sum();
    let mut numbers: Vec<u64> = all().map(|changes| changes.number).collect();
    numbers.sort_unstable();
    numbers.dedup();
    let (mut done, mut told) = (0, Instant::now());
    for number in numbers {
        if app.is_draining() {
            return Err(Error::Draining);
        }
        // Adapters first: in their transaction, they saw the weights of their model as they were before it.
        for member in members.iter_mut().rev() {
            let Some(changes) = member.next(number) else { continue };
            done += changes.tokens;
            let read = member.logged.read(changes)?;
            member.exact &= member.handle.call(move |owner| owner.replay(read)).await?;
        }
        for member in members.iter_mut() {
            if member.next(number).is_some() {
                member.handle.call(move |owner| owner.end_replay(number)).await?;
                member.done += 1;
            }
        }
        if told.elapsed() > PROGRESS {
            let model = members.first().map_or("", |member| member.handle.name());
            tracing::info!(model, done, total, "computing committed batches again, in tokens");
            told = Instant::now();
        }
    }
    Ok(())
}

impl Member {
    /// Its changes in frame `number`, unless they were applied.
    fn next(&self, number: u64) -> Option<&LoggedChanges> {
        let next = self.logged.changes.get(self.done);
        next.filter(|changes| changes.number == number)
    }
}
