# The agents of other nodes, as one system job: each tells the service of its node's GPUs, memory and processes.
#
# What is a node's own (its name, its address, its certificates) lies in that node's agent.yaml, so one spec fits all.
# On each client: docker's allowed_modes { pid = ["host"] }, and the three capabilities below in allow_caps.

variable "job_id" { type = string }
variable "namespace" { type = string }
variable "nodes" { type = list(string) } # unique names of the clients
variable "image" { type = string }       # the service's: repository@sha256:…
variable "config_dir" { type = string }  # on each node: agent.yaml and its tls folder, read-only
variable "mounts" { type = map(string) } # further directories, read-only: environments whose versions may be asked for
variable "cpu" { type = number }
variable "memory_mb" { type = number }

job "rotator-agent" {
  id          = var.job_id
  name        = var.job_id
  namespace   = var.namespace
  type        = "system"
  node_pool   = "all" # Nomad's own name for every pool: the nodes are named below
  datacenters = ["*"]
  priority    = 80

  meta = {
    role = "rotator-agent"
  }

  constraint {
    attribute = "${node.unique.name}"
    operator  = "set_contains_any"
    value     = join(",", var.nodes)
  }

  # Node by node: while one agent is exchanged the service sees the other nodes.
  update {
    max_parallel = 1
  }

  group "agent" {
    # Engines go on serving while it is away: only their node is out of sight.
    restart {
      attempts = 5
      interval = "5m"
      delay    = "5s"
      mode     = "delay"
    }

    ephemeral_disk {
      size = 250
    }

    network {
      mode = "host"
    }

    task "agent" {
      driver       = "docker"
      user         = "root" # docker gives added capabilities to root alone
      kill_signal  = "SIGTERM"
      kill_timeout = "20s"

      config {
        image           = var.image
        runtime         = "nvidia" # NVML; no kernels run here
        init            = true
        network_mode    = "host"
        pid_mode        = "host" # whose processes hold VRAM, and which are an engine's
        readonly_rootfs = true
        cap_drop        = ["all"]
        cap_add         = ["sys_ptrace", "dac_read_search", "kill"] # as the systemd unit: look into processes, end engines
        security_opt    = ["no-new-privileges"]
        args            = ["agent", "-c", "/etc/rotator/agent.yaml"]

        mounts = concat(
          [
            { type = "bind", source = var.config_dir, target = "/etc/rotator", readonly = true },
            { type = "tmpfs", target = "/tmp", tmpfs_options = { size = 67108864 } },
          ],
          [for from, to in var.mounts : { type = "bind", source = from, target = to, readonly = true }],
        )
      }

      env {
        NVIDIA_VISIBLE_DEVICES     = "all" # it tells of every GPU of its node
        NVIDIA_DRIVER_CAPABILITIES = "utility"
      }

      logs {
        max_files     = 5
        max_file_size = 20
      }

      resources {
        cpu    = var.cpu
        memory = var.memory_mb
      }
    }
  }
}
