//! Resumed equals uninterrupted, bit for bit; damage is refused by name.

use std::fs;
use std::path::Path;

use candle_models::training::checkpoint::{self, Details, Library, Writing};
use candle_models::training::{AdamW, AdamWOptions, LossScale};
use candle_models::{Device, Error, LoadOptions, Model};
use serde_json::json;

use crate::support::{MODELS, golden_directory, gradient, random_sequence, read_parameter};

fn load(name: &str) -> Model {
    Model::load(&golden_directory().join(name), &LoadOptions::default()).unwrap()
}

fn train(model: &mut Model, optimizer: &mut AdamW, steps: std::ops::Range<u64>) {
    let options = AdamWOptions {
        max_grad_norm: Some(1.0),
        ..AdamWOptions::default()
    };
    for step in steps {
        let batch = [
            random_sequence(&model.decoder, 17, step),
            random_sequence(&model.decoder, 5, step + 100),
        ];
        let (gradient, _) = gradient(&model.decoder, &batch);
        optimizer.step(&mut model.decoder, &gradient, &options).unwrap();
    }
}

fn bits(model: &Model) -> Vec<Vec<u32>> {
    let names = model.decoder.parameters().iter().map(|parameter| &parameter.name);
    names
        .map(|name| {
            read_parameter(&model.decoder, name)
                .iter()
                .map(|value| value.to_bits())
                .collect()
        })
        .collect()
}

fn save(directory: &Path, model: &Model, optimizer: &AdamW) -> checkpoint::Saved {
    let details = Details {
        tag: "test".into(),
        log: vec![json!({"step": 3})],
        loss_scale: LossScale {
            scale: 0.1,
            good_steps: 7,
        },
        seed: u64::MAX,
    };
    checkpoint::save(directory, model, optimizer, details).unwrap()
}

#[test]
fn resumed_equals_uninterrupted() {
    for name in MODELS {
        let (mut straight, mut straight_optimizer) = (load(name), AdamW::new());
        train(&mut straight, &mut straight_optimizer, 0..7);

        let (mut model, mut optimizer) = (load(name), AdamW::new());
        train(&mut model, &mut optimizer, 0..3);
        let folder = tempfile::tempdir().unwrap();
        let directory = folder.path().join("3");
        let saved = save(&directory, &model, &optimizer);
        assert_eq!(saved.sha256.len(), 64);
        let on_disk: u64 = fs::read_dir(&directory)
            .unwrap()
            .map(|f| f.unwrap().metadata().unwrap().len())
            .sum();
        assert_eq!(saved.bytes, on_disk);
        assert_eq!(
            fs::read_dir(folder.path()).unwrap().count(),
            1,
            "something was left beside the checkpoint"
        );

        assert_eq!(checkpoint::read_manifest(&directory).unwrap().1, saved);
        let restored = checkpoint::load(&directory, &Device::Cpu).unwrap();
        let (mut model, mut optimizer) = (restored.model, restored.optimizer);
        assert_eq!((restored.manifest.step, optimizer.steps()), (3, 3));
        assert_eq!(restored.manifest.log, [json!({"step": 3})]);
        let LossScale { scale, good_steps } = restored.manifest.loss_scale;
        assert_eq!((scale, good_steps, restored.manifest.seed), (0.1, 7, u64::MAX));
        train(&mut model, &mut optimizer, 3..7);
        assert_eq!(bits(&model), bits(&straight), "{name}");
    }
}

#[test]
fn shared_layers_are_saved_under_every_name_and_restored_as_shared() {
    let folder = tempfile::tempdir().unwrap();
    let config = json!({"share": "all"});
    let options = LoadOptions {
        config: config.as_object().unwrap().clone(),
        ..LoadOptions::default()
    };
    let mut model = Model::load(&golden_directory().join("gpt2"), &options).unwrap();
    assert_eq!(model.config["share"], 1);
    train(&mut model, &mut AdamW::new(), 0..2);
    let directory = folder.path().join("2");
    save(&directory, &model, &AdamW::new());
    // What transformers opens has every layer's parameters.
    let unshared = Model::load(&directory, &LoadOptions::default()).unwrap();
    assert!(unshared.decoder.parameters().len() > model.decoder.parameters().len());
    let read = |decoder, layer| read_parameter(decoder, &format!("transformer.h.{layer}.mlp.c_fc.weight"));
    assert_eq!(read(&unshared.decoder, 0), read(&unshared.decoder, 1));
    let logits = |model: &Model| -> Vec<f32> {
        let logits = model.decoder.logits(&[1, 2, 3]).unwrap();
        logits.flatten_all().unwrap().to_vec1().unwrap()
    };
    assert_eq!(logits(&unshared), logits(&model));
    let restored = checkpoint::load(&directory, &Device::Cpu).unwrap();
    assert_eq!(bits(&restored.model), bits(&model));
    assert_eq!(logits(&restored.model), logits(&model));
}

#[test]
fn files_have_transformers_tensors_and_configuration() {
    let folder = tempfile::tempdir().unwrap();
    for name in MODELS.into_iter().chain(["gpt_neox-sequential", "gptj-tied"]) {
        let model = load(name);
        let directory = folder.path().join(name);
        save(&directory, &model, &AdamW::new());
        let tensors = |directory: &Path| {
            let tensors = candle_core::safetensors::load(directory.join("model.safetensors"), &Device::Cpu).unwrap();
            let shapes = tensors.into_iter().map(|(name, tensor)| (name, tensor.dims().to_vec()));
            shapes.collect::<std::collections::BTreeMap<_, _>>()
        };
        assert_eq!(tensors(&directory), tensors(&golden_directory().join(name)), "{name}");
        let opened = Model::load(&directory, &LoadOptions::default()).unwrap();
        assert_eq!(opened.decoder.config(), model.decoder.config(), "{name}");
        assert_eq!(bits(&opened), bits(&model), "{name}");
    }
}

#[test]
fn frozen_parameters_stay_frozen() {
    let folder = tempfile::tempdir().unwrap();
    let (mut model, mut optimizer) = (load("gpt2"), AdamW::new());
    let frozen = [
        "transformer.wte.weight",
        "transformer.h.0.ln_1.weight",
        "transformer.h.1.mlp.c_fc.bias",
    ];
    for name in frozen {
        let parameter = model.decoder.parameter_id(name).unwrap();
        model.decoder.set_trainable(parameter, false);
    }
    let before = bits(&model);
    train(&mut model, &mut optimizer, 0..2);
    save(&folder.path().join("2"), &model, &optimizer);
    let restored = checkpoint::load(&folder.path().join("2"), &Device::Cpu).unwrap();
    let (mut model, mut optimizer) = (restored.model, restored.optimizer);
    train(&mut model, &mut optimizer, 2..3);
    for ((parameter, before), after) in model.decoder.parameters().iter().zip(&before).zip(&bits(&model)) {
        let name = parameter.name.as_str();
        assert_eq!(parameter.trainable, !frozen.contains(&name), "{name}");
        assert_eq!(before == after, frozen.contains(&name), "{name}");
    }
}

/// Names of a checkpoint's files that have other names too.
fn shared(directory: &Path) -> Vec<String> {
    use std::os::unix::fs::MetadataExt as _;

    let files = fs::read_dir(directory).unwrap().map(Result::unwrap);
    let shared = files.filter(|file| file.metadata().unwrap().nlink() > 1);
    let mut names: Vec<String> = shared.map(|file| file.file_name().into_string().unwrap()).collect();
    names.sort();
    names
}

#[test]
fn files_that_have_not_changed_are_shared_unless_they_are_damaged() {
    let folder = tempfile::tempdir().unwrap();
    let (mut model, mut optimizer) = (load("gpt2"), AdamW::new());
    for name in ["transformer.wte.weight", "transformer.wpe.weight"] {
        let parameter = model.decoder.parameter_id(name).unwrap();
        model.decoder.set_trainable(parameter, false);
    }
    let mut library = Library::default();
    let mut save = |name: &str, model: &Model, optimizer: &AdamW| {
        let directory = folder.path().join(name);
        let writing = Writing {
            library: &library,
            cancelled: &|| false,
            progress: &|_, _| {},
        };
        checkpoint::save_with(&directory, model, optimizer, Details::default(), &writing).unwrap();
        library.add(&directory, &checkpoint::verify(&directory).unwrap().files);
        directory
    };
    train(&mut model, &mut optimizer, 0..1);
    let first = save("1", &model, &optimizer);
    assert_eq!(shared(&first), [""; 0]);
    train(&mut model, &mut optimizer, 1..2);
    let second = save("2", &model, &optimizer);
    let frozen = "model-00001-of-00002.safetensors";
    assert_eq!(shared(&second), [frozen]);
    let again = save("2 again", &model, &optimizer);
    assert_eq!(
        shared(&again),
        [frozen, "model-00002-of-00002.safetensors", "optimizer.safetensors"]
    );
    let restored = checkpoint::load(&second, &Device::Cpu).unwrap();
    assert_eq!(bits(&restored.model), bits(&model));
    // The space of the last name alone is freed, and nobody else loses anything.
    fs::remove_dir_all(&first).unwrap();
    fs::remove_dir_all(&again).unwrap();
    assert_eq!(shared(&second), [""; 0]);
    checkpoint::verify(&second).unwrap();
    // What is damaged is written anew rather than shared.
    let mut bytes = fs::read(second.join(frozen)).unwrap();
    let last = bytes.len() - 1;
    bytes[last] ^= 1;
    fs::write(second.join(frozen), bytes).unwrap();
    let mut library = Library::default();
    library.add(&second, &checkpoint::read_manifest(&second).unwrap().0.files);
    let directory = folder.path().join("3");
    let writing = Writing {
        library: &library,
        cancelled: &|| false,
        progress: &|_, _| {},
    };
    checkpoint::save_with(&directory, &model, &optimizer, Details::default(), &writing).unwrap();
    checkpoint::verify(&directory).unwrap();
}

#[test]
fn a_cancelled_save_leaves_nothing() {
    let folder = tempfile::tempdir().unwrap();
    let model = load("gpt2");
    let asked = std::cell::Cell::new(0);
    let done = std::cell::Cell::new((0, 0));
    let writing = Writing {
        library: &Library::default(),
        cancelled: &|| {
            asked.set(asked.get() + 1);
            asked.get() > 10
        },
        progress: &|now, total| done.set((now, total)),
    };
    let directory = folder.path().join("0");
    let error = checkpoint::save_with(&directory, &model, &AdamW::new(), Details::default(), &writing).unwrap_err();
    assert!(matches!(error, Error::Cancelled), "{error}");
    assert!(0 < done.get().0 && done.get().0 < done.get().1, "{done:?}");
    assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 0);
}

#[test]
fn a_model_that_was_never_trained_can_be_saved() {
    let folder = tempfile::tempdir().unwrap();
    let model = load("llama");
    save(&folder.path().join("0"), &model, &AdamW::new());
    let restored = checkpoint::load(&folder.path().join("0"), &Device::Cpu).unwrap();
    assert_eq!(restored.optimizer.steps(), 0);
    assert_eq!(bits(&restored.model), bits(&model));
}

#[test]
fn an_existing_checkpoint_is_not_overwritten() {
    let folder = tempfile::tempdir().unwrap();
    let model = load("qwen2");
    let directory = folder.path().join("0");
    save(&directory, &model, &AdamW::new());
    let error = checkpoint::save(&directory, &model, &AdamW::new(), Details::default()).unwrap_err();
    assert!(matches!(error, Error::FailedPrecondition(_)), "{error}");
    checkpoint::verify(&directory).unwrap();
}

#[test]
fn damage_is_refused_by_name() {
    let folder = tempfile::tempdir().unwrap();
    let directory = folder.path().join("2");
    let (mut model, mut optimizer) = (load("gpt2"), AdamW::new());
    train(&mut model, &mut optimizer, 0..2);
    save(&directory, &model, &optimizer);

    let manifest = checkpoint::verify(&directory).unwrap();
    let optimizer_file = manifest
        .files
        .iter()
        .find(|file| file.name == "optimizer.safetensors")
        .unwrap();
    let tensor = &optimizer_file.tensors[3];
    let refused = |name: &str, change: &dyn Fn(&mut Vec<u8>), expected: &str| {
        let path = directory.join(name);
        let original = fs::read(&path).unwrap();
        let mut bytes = original.clone();
        change(&mut bytes);
        fs::write(&path, bytes).unwrap();
        let message = match checkpoint::load(&directory, &Device::Cpu) {
            Ok(_) => panic!("a damaged {name} was loaded"),
            Err(error) => error.to_string(),
        };
        assert!(
            message.contains(name) && message.contains(expected),
            "{message:?} {expected:?}"
        );
        fs::write(&path, original).unwrap();
    };
    refused(
        "optimizer.safetensors",
        &|bytes| bytes[tensor.offset as usize] ^= 1,
        &tensor.name,
    );
    refused(
        "optimizer.safetensors",
        &|bytes| bytes.truncate(bytes.len() - 1),
        "bytes, but the manifest says",
    );
    refused("model.safetensors", &|bytes| bytes[9] ^= 1, "SHA-256");
    refused("config.json", &|bytes| bytes[2] ^= 1, "SHA-256");
    refused("manifest.json", &|bytes| bytes.truncate(40), "SHA-256");
    // Still JSON of the right shape, but of another step and with another name for a tensor.
    refused(
        "manifest.json",
        &|bytes| replace(bytes, "\"step\": 2", "\"step\": 3"),
        "SHA-256",
    );
    refused(
        "manifest.json",
        &|bytes| replace(bytes, "exp_avg_sq.", "exp_avg_sr."),
        "SHA-256",
    );
    checkpoint::load(&directory, &Device::Cpu).unwrap();
    fs::remove_file(directory.join("model.safetensors")).unwrap();
    let error = checkpoint::load(&directory, &Device::Cpu).err().unwrap().to_string();
    assert!(
        error.contains("model.safetensors") && error.contains("missing"),
        "{error}"
    );
}

/// Replaces a text that must be there.
fn replace(bytes: &mut Vec<u8>, from: &str, to: &str) {
    let text = String::from_utf8(std::mem::take(bytes)).unwrap();
    assert!(text.contains(from), "{from}");
    *bytes = text.replace(from, to).into_bytes();
}
