//! Where a model's weights may come from. The only files read lie below the models folder and the data folder.

use std::path::{Component, Path, PathBuf};

use crate::error::{Error, Result};

/// A source as a user wrote it, taken apart.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Source {
    /// Made from its configuration.
    Nothing,
    /// A path relative to the models folder, not yet looked up.
    Path(PathBuf),
    /// A checkpoint.
    Checkpoint {
        /// The model it was made of.
        model: String,
        /// Its optimizer step.
        step: u64,
    },
}

impl Source {
    /// Takes `text` apart.
    ///
    /// # Errors
    /// `InvalidArgument` for an absolute path, one with `..`, or a malformed checkpoint; `Unsupported` for a hub.
    pub(crate) fn parse(text: &str) -> Result<Self> {
        if text.is_empty() {
            return Ok(Self::Nothing);
        }
        if let Some(rest) = text.strip_prefix("checkpoint://") {
            let parts = rest.rsplit_once('/').filter(|(model, _)| !model.is_empty());
            let parts = parts.and_then(|(model, step)| Some((model, step.parse().ok()?)));
            let (model, step) = parts.ok_or_else(|| {
                Error::invalid(format!(
                    "source {text:?} is not of the form checkpoint://MODEL/STEP with a number as STEP"
                ))
            })?;
            return Ok(Self::Checkpoint {
                model: model.to_owned(),
                step,
            });
        }
        if text.starts_with("hf://") {
            return Err(Error::Model(candle_models::Error::Unsupported(format!(
                "source {text:?}: this server reaches no hub; put the files below the models folder and name their path"
            ))));
        }
        if text.contains('\0') || text.len() > 4096 {
            return Err(Error::invalid(
                "the source is longer than 4096 bytes or contains a zero byte",
            ));
        }
        let path = Path::new(text);
        let outside = path
            .components()
            .any(|part| !matches!(part, Component::Normal(_) | Component::CurDir));
        if outside || text.contains("://") {
            return Err(Error::invalid(format!(
                "source {text:?} must be a path relative to the models folder, without \"..\", or checkpoint://MODEL/STEP"
            )));
        }
        Ok(Self::Path(path.to_owned()))
    }
}

/// The file or folder `path` below `models_dir`, symbolic links followed.
///
/// # Errors
/// `InvalidArgument` when there is none, or a symbolic link leads outside.
pub(crate) fn locate(models_dir: &Path, path: &Path) -> Result<PathBuf> {
    let shown = path.display();
    let root = models_dir.canonicalize().map_err(|error| {
        Error::invalid(format!(
            "source {shown}: the server's models folder cannot be read: {error}"
        ))
    })?;
    let found = root.join(path).canonicalize().map_err(|error| match error.kind() {
        std::io::ErrorKind::NotFound => Error::invalid(format!(
            "source {shown}: no such file or folder below the models folder"
        )),
        _ => Error::invalid(format!("source {shown}: {error}")),
    })?;
    if !found.starts_with(&root) {
        return Err(Error::invalid(format!(
            "source {shown} leads outside the models folder"
        )));
    }
    // A file of weights has its configuration and tokenizer beside it.
    let folder = if found.is_dir() {
        Some(found.as_path())
    } else {
        found.parent()
    };
    if let Some(folder) = folder.filter(|_| !is_gguf(&found)) {
        refuse_links_outside(&root, folder, path)?;
    }
    Ok(found)
}

/// Refuses a folder with a symbolic link that leads outside the models folder: the loader would follow it. Links
/// within it are how the cache of Hugging Face lays out its snapshots.
fn refuse_links_outside(root: &Path, folder: &Path, source: &Path) -> Result<()> {
    let Ok(entries) = std::fs::read_dir(folder) else {
        return Ok(());
    };
    for entry in entries.flatten() {
        let is_link = entry.file_type().is_ok_and(|kind| kind.is_symlink());
        // A link to nothing is reported by the loader, should it need the file.
        if is_link
            && entry
                .path()
                .canonicalize()
                .is_ok_and(|target| !target.starts_with(root))
        {
            return Err(Error::invalid(format!(
                "source {}: its file {:?} is a symbolic link that leads outside the models folder",
                source.display(),
                entry.file_name(),
            )));
        }
    }
    Ok(())
}

/// The error of a loader, with paths relative to `folder`: where the server keeps its files is not the caller's business.
pub(crate) fn relative(error: candle_models::Error, folder: &Path) -> candle_models::Error {
    use candle_models::Error as ModelError;

    let Ok(root) = folder.canonicalize() else { return error };
    let prefix = format!("{}/", root.display());
    let shorten = |text: String| text.replace(&prefix, "");
    match error {
        ModelError::InvalidFile { path, reason } => ModelError::InvalidFile {
            path: match shorten(path) {
                path if Path::new(&path) == root => ".".to_owned(),
                path => path,
            },
            reason: shorten(reason),
        },
        ModelError::InvalidArgument(message) => ModelError::InvalidArgument(shorten(message)),
        ModelError::Unsupported(message) => ModelError::Unsupported(shorten(message)),
        other => other,
    }
}

/// The digest of a model's files, computed on a thread of its own while they are loaded.
pub(crate) struct Digest(std::thread::JoinHandle<std::io::Result<String>>);

/// Begins to compute the digest of the files at `path`.
pub(crate) fn begin_digest(path: &Path) -> Digest {
    let path = path.to_owned();
    Digest(std::thread::spawn(move || digest(&path)))
}

impl Digest {
    /// Waits for it.
    ///
    /// # Errors
    /// `Io`.
    pub(crate) fn finish(self, path: &Path) -> Result<String> {
        let digest = self
            .0
            .join()
            .unwrap_or_else(|_| Err(std::io::Error::other("the thread panicked")));
        let name = path.file_name().unwrap_or_default().display();
        digest.map_err(|error| Error::io(format!("computing the digest of {name}"), error))
    }
}

/// SHA-256 over names, sizes and contents of the files at `path` that a model is loaded from, in hexadecimal.
fn digest(path: &Path) -> std::io::Result<String> {
    use std::io::Read as _;

    use sha2::{Digest as _, Sha256};

    let mut files = files_of(path)?;
    files.sort();
    files.dedup();
    let mut digest = Sha256::new();
    let mut piece = vec![0; 1 << 20];
    for path in files {
        let mut file = std::fs::File::open(&path)?;
        let name = path.file_name().unwrap_or_default().as_encoded_bytes();
        digest.update((name.len() as u64).to_le_bytes());
        digest.update(name);
        digest.update(file.metadata()?.len().to_le_bytes());
        loop {
            match file.read(&mut piece)? {
                0 => break,
                length => digest.update(&piece[..length]),
            }
        }
    }
    Ok(digest.finalize().iter().map(|byte| format!("{byte:02x}")).collect())
}

/// The files at `path` that a model is loaded from.
fn files_of(path: &Path) -> std::io::Result<Vec<PathBuf>> {
    const READ: [&str; 7] = ["safetensors", "gguf", "json", "txt", "bpe", "jinja", "model"];
    // What is read of the folder that a file of weights lies in, whatever else is there.
    const BESIDE: [&str; 11] = [
        "added_tokens.json",
        "chat_template.jinja",
        "config.json",
        "encoder.json",
        "generation_config.json",
        "merges.txt",
        "tokenizer.json",
        "tokenizer.model",
        "tokenizer_config.json",
        "vocab.bpe",
        "vocab.json",
    ];
    if is_gguf(path) {
        return Ok(vec![path.to_owned()]);
    }
    let mut files = Vec::new();
    if path.is_dir() {
        for entry in std::fs::read_dir(path)? {
            let file = entry?.path();
            let extension = file.extension();
            if extension.is_some_and(|found| READ.iter().any(|&read| found == read)) {
                files.push(file);
            }
        }
    } else {
        files.extend(BESIDE.map(|name| path.with_file_name(name)));
    }
    // A manifest that cannot be read is reported by the loader.
    files.extend(candle_models::formats::weight_files(path).unwrap_or_default());
    files.retain(|file| file.is_file());
    Ok(files)
}

/// Whether a path is a file that is read alone.
fn is_gguf(path: &Path) -> bool {
    !path.is_dir() && !candle_models::formats::has_documents_beside(path)
}

/// Bytes of the files of weights at `path`: what loading them will hold at least, compressed ones apart.
pub(crate) fn size(path: &Path) -> u64 {
    let length = |path: &PathBuf| std::fs::metadata(path).map_or(0, |data| if data.is_file() { data.len() } else { 0 });
    if is_gguf(path) {
        return length(&path.to_owned());
    }
    // A checkpoint has more than a model's weights.
    let mut files = candle_models::formats::weight_files(path).unwrap_or_default();
    let entries = std::fs::read_dir(path).into_iter().flatten();
    let entries = entries.filter_map(|entry| Some(entry.ok()?.path()));
    files.extend(entries.filter(|path| path.extension().is_some_and(|extension| extension == "safetensors")));
    files.sort();
    files.dedup();
    files.iter().map(length).sum()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_relative_paths_and_checkpoints_are_sources() {
        assert_eq!(Source::parse("").unwrap(), Source::Nothing);
        assert_eq!(Source::parse("a/b.gguf").unwrap(), Source::Path("a/b.gguf".into()));
        let checkpoint = Source::Checkpoint {
            model: "a/b".into(),
            step: 12,
        };
        assert_eq!(Source::parse("checkpoint://a/b/12").unwrap(), checkpoint);
        for refused in [
            "/etc/passwd",
            "../x",
            "a/../../x",
            "checkpoint://m",
            "checkpoint:///1",
            "checkpoint://m/x",
            "hf://a/b",
            "http://x/y",
        ] {
            assert!(Source::parse(refused).is_err(), "{refused}");
        }
    }

    #[test]
    fn a_digest_changes_with_contents_and_names() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path();
        std::fs::write(path.join("config.json"), "{}").unwrap();
        let first = digest(path).unwrap();
        std::fs::write(path.join("README"), "not read").unwrap();
        assert_eq!(digest(path).unwrap(), first);
        std::fs::write(path.join("config.json"), "[]").unwrap();
        let second = digest(path).unwrap();
        std::fs::rename(path.join("config.json"), path.join("other.json")).unwrap();
        let third = digest(path).unwrap();
        assert!(first != second && second != third);
        assert_ne!(digest(&path.join("other.json")).unwrap(), second);
    }

    #[test]
    fn a_digest_covers_the_files_of_a_manifest_and_what_lies_beside_weights() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path();
        std::fs::create_dir(path.join("shards")).unwrap();
        let line = r#"{"name": "t", "dtype": "F32", "shape": [1], "file": "shards/a.bin", "byte_range": [0, 4],
            "sha256": "00"}"#;
        std::fs::write(path.join("model.jsonl"), line.replace('\n', "")).unwrap();
        for source in [path.to_owned(), path.join("model.jsonl")] {
            std::fs::write(path.join("shards/a.bin"), [0; 4]).unwrap();
            let first = digest(&source).unwrap();
            std::fs::write(path.join("other.npz"), "not read").unwrap();
            assert_eq!(digest(&source).unwrap(), first);
            std::fs::write(path.join("shards/a.bin"), [1; 4]).unwrap();
            let second = digest(&source).unwrap();
            std::fs::write(path.join("config.json"), "{}").unwrap();
            assert!(first != second && digest(&source).unwrap() != second);
            std::fs::remove_file(path.join("config.json")).unwrap();
        }
        assert!(size(path) > 4);
    }

    #[test]
    fn an_error_names_files_relative_to_the_models_folder() {
        let folder = tempfile::tempdir().unwrap();
        let root = folder.path().canonicalize().unwrap();
        let shown = |path: &Path| {
            let error = candle_models::Error::InvalidFile {
                path: path.display().to_string(),
                reason: "damaged".into(),
            };
            relative(error, folder.path()).to_string()
        };
        assert_eq!(shown(&root.join("a/b.gguf")), "invalid file `a/b.gguf`: damaged");
        assert_eq!(shown(&root), "invalid file `.`: damaged");
    }

    #[test]
    fn a_symbolic_link_that_leads_outside_is_refused() {
        let folder = tempfile::tempdir().unwrap();
        let models = folder.path().join("models");
        std::fs::create_dir(&models).unwrap();
        std::fs::write(folder.path().join("secret"), "x").unwrap();
        std::os::unix::fs::symlink(folder.path().join("secret"), models.join("link")).unwrap();
        std::fs::write(models.join("file"), "x").unwrap();
        assert!(locate(&models, Path::new("file")).is_ok());
        assert!(
            locate(&models, Path::new("link"))
                .unwrap_err()
                .to_string()
                .contains("outside")
        );
        std::fs::create_dir(models.join("folder")).unwrap();
        assert!(locate(&models, Path::new("folder")).is_ok());
        std::os::unix::fs::symlink("../file", models.join("folder/inside")).unwrap();
        assert!(locate(&models, Path::new("folder")).is_ok());
        std::os::unix::fs::symlink(folder.path().join("secret"), models.join("folder/config.json")).unwrap();
        let refused = locate(&models, Path::new("folder")).unwrap_err().to_string();
        assert!(refused.contains("\"config.json\" is a symbolic link"), "{refused}");
        assert!(
            locate(&models, Path::new("missing"))
                .unwrap_err()
                .to_string()
                .contains("no such file")
        );
    }
}
