config_dir = "/etc/rotator"
cpu = 500
image = "registry.example/rotator@sha256:4444444444444444444444444444444444444444444444444444444444444444"
job_id = "rotator-agent"
memory_mb = 512
mounts = {}
namespace = "default"
nodes = ["spark1", "spark2"]
