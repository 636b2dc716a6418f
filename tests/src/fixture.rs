//! A database in which the extension talks to a compute server.

use postgres::Client;

use crate::cluster::Cluster;
use crate::server::ComputeServer;

/// A fresh database with the extension, a foreign server named `compute`, and its tables in schema `llm`.
#[derive(Debug)]
pub struct Fixture {
    /// The compute server behind the foreign server `compute`.
    pub server: ComputeServer,
    database: String,
}

impl Fixture {
    /// Sets up a database over a fresh compute server.
    #[must_use]
    pub fn new() -> Self {
        Self::over(ComputeServer::start())
    }

    /// Sets up a database over a given compute server.
    #[must_use]
    pub fn over(server: ComputeServer) -> Self {
        let fixture = Self::bare(server);
        add_server(&mut fixture.connect(), "compute", &fixture.server, "llm");
        fixture
    }

    /// Sets up a database over a compute server that asks for a token, which the superuser shows.
    #[must_use]
    pub fn over_with_token(server: ComputeServer, token: &str) -> Self {
        let fixture = Self::over(server);
        let mapping = format!("CREATE USER MAPPING FOR CURRENT_USER SERVER compute OPTIONS (token '{token}')");
        let mapped = fixture.connect().batch_execute(&mapping);
        mapped.expect("a user mapping can be made");
        fixture
    }

    /// Sets up a database with the extension, but without a foreign server.
    #[must_use]
    pub fn bare(server: ComputeServer) -> Self {
        let fixture = Self {
            server,
            database: Cluster::shared().create_database(),
        };
        let created = fixture.connect().batch_execute("CREATE EXTENSION candle_fdw");
        created.expect("the extension is installed");
        fixture
    }

    /// Sets up a database with a tokenizer `small` (vocabulary 300) and the models of [`Self::create_models`].
    #[must_use]
    pub fn with_models() -> Self {
        let fixture = Self::new();
        fixture.create_models();
        fixture
    }

    /// Trains the tokenizer `small` and makes two tiny models that use it: `tiny`, a GPT-2 with 64 positions, and
    /// `endless`, a Llama whose context is long enough that a generation is still running when a test looks.
    pub fn create_models(&self) {
        let mut client = self.connect();
        client.batch_execute(CREATE_MODELS).expect("tiny models can be made");
    }

    /// Opens a session.
    #[must_use]
    pub fn connect(&self) -> Client {
        Cluster::shared().connect(&self.database)
    }

    /// Opens a session as another user.
    ///
    /// # Errors
    /// What Postgres refused the connection with.
    pub fn connect_as(&self, user: &str) -> Result<Client, postgres::Error> {
        Cluster::shared().connect_as(&self.database, user)
    }

    /// Asserts that no work is left on the compute server once it had time to notice.
    pub fn assert_idle(&self) {
        let mut client = self.connect();
        crate::waiting::wait_for("the server to be idle", || {
            let row = client.query_one("SELECT count(*) FROM llm.requests", &[]).ok()?;
            (row.get::<_, i64>(0) == 0).then_some(())
        });
        Cluster::shared().assert_no_crash();
    }

    /// Waits until the compute server works on a request of this kind.
    pub fn wait_for_work(&self, kind: &str) {
        let mut client = self.connect();
        crate::waiting::wait_for(&format!("a request of kind {kind}"), || {
            let row = client
                .query_one("SELECT count(*) FROM llm.requests WHERE kind = $1", &[&kind])
                .ok()?;
            (row.get::<_, i64>(0) > 0).then_some(())
        });
    }
}

impl Default for Fixture {
    fn default() -> Self {
        Self::new()
    }
}

/// Defines a foreign server for a compute server and imports its tables into a new schema.
///
/// # Panics
/// When a statement fails.
pub fn add_server(client: &mut Client, name: &str, server: &ComputeServer, schema: &str) {
    let endpoint = server.endpoint();
    let statements = format!(
        "CREATE SERVER {name} FOREIGN DATA WRAPPER candle_fdw OPTIONS (endpoint '{endpoint}');
         CREATE SCHEMA {schema};
         IMPORT FOREIGN SCHEMA candle FROM SERVER {name} INTO {schema};"
    );
    client
        .batch_execute(&statements)
        .expect("a foreign server can be defined");
}

const CREATE_MODELS: &str = r#"
CALL candle.train_tokenizer('small',
    'SELECT d FROM (SELECT description AS d, objoid FROM pg_description ORDER BY objoid, description LIMIT 200) s', 300);
INSERT INTO llm.models (name, config, seed) VALUES
    ('tiny', '{"architecture": "gpt2", "layers": 2, "width": 32, "heads": 2, "context_length": 64,
               "tokenizer": "small"}', 1),
    ('endless', '{"architecture": "llama", "layers": 2, "width": 32, "heads": 4, "key_value_heads": 2,
                  "context_length": 200000, "tokenizer": "small"}', 1);
"#;
