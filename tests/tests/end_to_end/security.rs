//! Roles, quotas, TLS and secrets, as SQL sees them.

use std::os::unix::fs::PermissionsExt;
use std::path::Path;

use end_to_end_tests::database_errors::expect_failure;
use end_to_end_tests::fixture::Fixture;
use end_to_end_tests::server::ComputeServer;
use postgres::Client;
use rcgen::{BasicConstraints, CertificateParams, CertifiedIssuer, IsCa, KeyPair, date_time_ymd};
use tempfile::TempDir;

/// Makes a file that the database server, which is another user, can read.
fn publish(folder: &TempDir, name: &str, text: &str) -> String {
    std::fs::set_permissions(folder.path(), PermissionsExt::from_mode(0o755)).unwrap();
    let path = folder.path().join(name);
    std::fs::write(&path, text).unwrap();
    std::fs::set_permissions(&path, PermissionsExt::from_mode(0o644)).unwrap();
    path.to_str().unwrap().to_owned()
}

fn map(client: &mut Client, user: &str, options: &str) {
    let statement = format!(
        "DROP USER MAPPING IF EXISTS FOR {user} SERVER compute;
         CREATE USER MAPPING FOR {user} SERVER compute OPTIONS ({options})"
    );
    client.batch_execute(&statement).unwrap();
}

const GENERATE: &str =
    "SELECT completion FROM llm.generations WHERE model = 'tiny' AND prompt = 'the function' AND max_tokens = 8";
const BATCH: &str = "INSERT INTO llm.batches (model, tokens) VALUES ('tiny', '{1,2,3}')";

#[test]
fn roles_and_quotas_of_the_token_decide() {
    let folder = tempfile::tempdir().unwrap();
    let tokens = publish(
        &folder,
        "tokens",
        "root r00t-t0ken\nann ann-t0ken roles=read,generate tokens_per_minute=30\nbob bob-t0ken roles=read,generate\n",
    );
    let fixture = Fixture::over_with_token(ComputeServer::start_with(&["--token-file", &tokens]), "r00t-t0ken");
    fixture.create_models();
    let mut root = fixture.connect();
    let session = |name: &str| {
        let mut client = fixture.connect();
        let statements = format!(
            "CREATE ROLE {name} LOGIN; GRANT USAGE ON SCHEMA llm TO {name};
             GRANT SELECT, INSERT, DELETE ON ALL TABLES IN SCHEMA llm TO {name};"
        );
        client.batch_execute(&statements).unwrap();
        map(&mut client, name, &format!("token '{name}-t0ken'"));
        fixture.connect_as(name).unwrap()
    };
    let (mut ann, mut bob) = (session("ann"), session("bob"));
    let expected: String = root.query_one(GENERATE, &[]).unwrap().get(0);

    let report = expect_failure(ann.execute(BATCH, &[]), "42501");
    assert!(
        report.contains("role \"train\"") && !report.contains("t0ken"),
        "{report}"
    );
    let load = "INSERT INTO llm.models (name, config) VALUES ('own', '{\"architecture\": \"gpt2\"}')";
    let report = expect_failure(ann.execute(load, &[]), "42501");
    assert!(report.contains("role \"admin\""), "{report}");

    let longer =
        "SELECT completion FROM llm.generations WHERE model = 'endless' AND prompt = 'the' AND max_tokens = 400";
    ann.query_one(longer, &[]).unwrap();
    let report = expect_failure(ann.query_one(GENERATE, &[]), "53400");
    assert!(
        report.contains("30 tokens per minute") && report.contains("try again in"),
        "{report}"
    );
    let undisturbed: String = bob.query_one(GENERATE, &[]).unwrap().get(0);
    assert_eq!(undisturbed, expected);

    // Work of others is neither seen nor cancelled, but for administrators.
    let mut running = fixture.connect();
    let worker = std::thread::spawn(move || {
        running.query(
            "SELECT completion FROM llm.generations WHERE model = 'endless' AND prompt = 'a' AND max_tokens = 190000",
            &[],
        )
    });
    fixture.wait_for_work("generate");
    let seen: i64 = bob.query_one("SELECT count(*) FROM llm.requests", &[]).unwrap().get(0);
    assert_eq!(seen, 0);
    let tenant: String = root.query_one("SELECT tenant FROM llm.requests", &[]).unwrap().get(0);
    assert_eq!(tenant, "root");
    bob.execute("DELETE FROM llm.requests", &[]).unwrap();
    root.execute("DELETE FROM llm.requests", &[]).unwrap();
    let _ = worker.join().unwrap();
    fixture.assert_idle();
}

#[test]
fn a_removed_token_is_refused_in_a_running_session() {
    let folder = tempfile::tempdir().unwrap();
    let tokens = publish(&folder, "tokens", "ann first-t0ken\n");
    let fixture = Fixture::over_with_token(ComputeServer::start_with(&["--token-file", &tokens]), "first-t0ken");
    let mut client = fixture.connect();
    client.query("SELECT name FROM llm.models", &[]).unwrap();
    std::fs::write(&tokens, "ann second-t0ken\n").unwrap();
    let report = expect_failure(client.query("SELECT name FROM llm.models", &[]), "28000");
    assert!(!report.contains("t0ken"), "{report}");
    map(&mut client, "CURRENT_USER", "token 'second-t0ken'");
    client.query("SELECT name FROM llm.models", &[]).unwrap();
}

#[test]
fn the_token_is_shown_nowhere() {
    const TOKEN: &str = "s3cret-t0ken-of-root";
    let folder = tempfile::tempdir().unwrap();
    let tokens = publish(&folder, "tokens", &format!("root {TOKEN}\n"));
    let fixture = Fixture::over_with_token(ComputeServer::start_with(&["--token-file", &tokens]), TOKEN);
    fixture.create_models();
    let mut client = fixture.connect();
    let mut shown = String::new();
    for format in ["TEXT", "JSON"] {
        let explain = format!("EXPLAIN (ANALYZE, VERBOSE, FORMAT {format}) {GENERATE}");
        for row in client.simple_query(&explain).unwrap() {
            if let postgres::SimpleQueryMessage::Row(row) = row {
                shown.push_str(row.get(0).unwrap_or_default());
            }
        }
    }
    let activity = client.query("SELECT query FROM pg_stat_activity", &[]).unwrap();
    activity
        .iter()
        .for_each(|row| shown.push_str(row.get::<_, Option<&str>>(0).unwrap_or_default()));
    assert!(shown.contains("Foreign Scan") && !shown.contains(TOKEN), "{shown}");
}

/// An authority, and certificates of it for localhost.
struct Certificates {
    issuer: CertifiedIssuer<'static, KeyPair>,
    folder: TempDir,
}

impl Certificates {
    fn new() -> Self {
        let mut params = CertificateParams::new(Vec::new()).unwrap();
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        let issuer = CertifiedIssuer::self_signed(params, KeyPair::generate().unwrap()).unwrap();
        let folder = tempfile::tempdir().unwrap();
        publish(&folder, "ca.pem", &issuer.pem());
        Self { issuer, folder }
    }

    /// Files of a certificate and its key.
    fn issue(&self, name: &str, expired: bool) -> (String, String) {
        let mut params = CertificateParams::new(vec!["localhost".to_owned()]).unwrap();
        if expired {
            (params.not_before, params.not_after) = (date_time_ymd(2000, 1, 1), date_time_ymd(2001, 1, 1));
        }
        let key = KeyPair::generate().unwrap();
        let certificate = params.signed_by(&key, &self.issuer).unwrap().pem();
        (
            publish(&self.folder, &format!("{name}.crt"), &certificate),
            publish(&self.folder, &format!("{name}.key"), &key.serialize_pem()),
        )
    }

    fn authority(&self) -> String {
        let path: &Path = self.folder.path();
        path.join("ca.pem").to_str().unwrap().to_owned()
    }
}

#[test]
fn sql_over_tls_with_a_certificate_of_its_own() {
    let certificates = Certificates::new();
    let (authority, own) = (certificates.authority(), certificates.issue("server", false));
    let server = ComputeServer::start_with(&["--tls-cert", &own.0, "--tls-key", &own.1, "--tls-client-ca", &authority]);
    let endpoint = server.endpoint().replace("http:", "https:");
    let fixture = Fixture::bare(server);
    let mut client = fixture.connect();
    let statement = format!(
        "CREATE SERVER compute FOREIGN DATA WRAPPER candle_fdw
             OPTIONS (endpoint '{endpoint}', tls_ca '{authority}', tls_domain 'localhost');
         CREATE SCHEMA llm; IMPORT FOREIGN SCHEMA candle FROM SERVER compute INTO llm"
    );
    client.batch_execute(&statement).unwrap();
    const QUERY: &str = "SELECT name FROM llm.models";
    // Without a certificate, with an expired one, with a good one.
    expect_failure(client.query(QUERY, &[]), "HV00N");
    let options = |files: &(String, String)| format!("tls_cert '{}', tls_key '{}'", files.0, files.1);
    map(
        &mut client,
        "CURRENT_USER",
        &options(&certificates.issue("expired", true)),
    );
    expect_failure(client.query(QUERY, &[]), "HV00N");
    let good = options(&certificates.issue("client", false));
    map(&mut client, "CURRENT_USER", &good);
    fixture.create_models();
    client.query_one(GENERATE, &[]).unwrap();

    // The files are read with the database server's rights.
    client
        .batch_execute("CREATE ROLE plain LOGIN; GRANT USAGE ON FOREIGN SERVER compute TO plain")
        .unwrap();
    let mut plain = fixture.connect_as("plain").unwrap();
    let own = format!("CREATE USER MAPPING FOR plain SERVER compute OPTIONS ({good})");
    let report = expect_failure(plain.batch_execute(&own), "42501");
    assert!(report.contains("superuser"), "{report}");
    let half = "CREATE USER MAPPING FOR plain SERVER compute OPTIONS (tls_cert '/x')";
    let report = expect_failure(client.batch_execute(half), "HV00J");
    assert!(report.contains("tls_key"), "{report}");
}

#[test]
fn experts_on_a_server_behind_a_token_and_tls() {
    const TOKEN: &str = "s3cret-t0ken-of-experts";
    let certificates = Certificates::new();
    let (authority, own) = (certificates.authority(), certificates.issue("server", false));
    let folder = tempfile::tempdir().unwrap();
    let asked = publish(&folder, "asked", &format!("here {TOKEN}\n"));
    let there = ComputeServer::start_with(&["--token-file", &asked, "--tls-cert", &own.0, "--tls-key", &own.1]);
    let port = there.endpoint().rsplit(':').next().unwrap().to_owned();
    let endpoint = format!("https://localhost:{port}");
    let shown = publish(&folder, "shown", &format!("{endpoint} {TOKEN}\n"));
    let here = ComputeServer::start_with(&["--expert-token-file", &shown, "--expert-ca-file", &authority]);
    let fixture = Fixture::over(here);
    let mut client = fixture.connect();
    let other = format!(
        "CREATE SERVER experts FOREIGN DATA WRAPPER candle_fdw
             OPTIONS (endpoint '{endpoint}', tls_ca '{authority}');
         CREATE USER MAPPING FOR CURRENT_USER SERVER experts OPTIONS (token '{TOKEN}');
         CREATE SCHEMA far; IMPORT FOREIGN SCHEMA candle FROM SERVER experts INTO far"
    );
    client.batch_execute(&other).unwrap();
    let load = |schema: &str, name: &str, seed: i32, servers: &str| {
        format!(
            r#"INSERT INTO {schema}.models (name, config, seed) VALUES ('{name}', '{{"architecture": "mixtral", "layers": 2,
                 "width": 12, "heads": 3, "context_length": 32, "vocabulary": 61, "num_experts": 3{servers}}}', {seed})"#
        )
    };
    let servers = format!(r#", "expert_servers": [{{"endpoint": "{endpoint}", "experts": [0, 2]}}]"#);
    client.batch_execute(&load("far", "m", 2, "")).unwrap();
    client.batch_execute(&load("llm", "whole", 1, "")).unwrap();
    client.batch_execute(&load("llm", "m", 1, &servers)).unwrap();
    let score = "SELECT sum(logprob)::float8 FROM llm.token_scores WHERE model = $1 AND tokens = '{1,2,3,4,5,6,7,8}'";
    let (m, whole) = ("m", "whole");
    let expected: f64 = client.query_one(score, &[&whole]).unwrap().get(0);
    let found: f64 = client.query_one(score, &[&m]).unwrap().get(0);
    assert!((expected - found).abs() < 1e-4, "{expected} {found}");
    publish(&folder, "shown", &format!("{endpoint} wr0ng-t0ken\n"));
    let report = expect_failure(client.query_one(score, &[&m]), "55000");
    assert!(
        report.contains(&endpoint) && report.contains("--expert-token-file") && !report.contains("t0ken"),
        "{report}"
    );
    publish(&folder, "shown", &format!("{endpoint} {TOKEN}\n"));
    let found: f64 = client.query_one(score, &[&m]).unwrap().get(0);
    assert!((expected - found).abs() < 1e-4, "{expected} {found}");
    let config: String = client
        .query_one("SELECT config::text FROM llm.models WHERE name = 'm'", &[])
        .unwrap()
        .get(0);
    assert!(config.contains(&endpoint) && !config.contains(TOKEN), "{config}");
}
