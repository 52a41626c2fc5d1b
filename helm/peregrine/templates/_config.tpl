{{/* The configuration as the containers read it: the values', with what a quantized checkpoint changes. */}}
{{- define "peregrine.config" -}}
{{- $config := deepCopy .Values.config }}
{{- if .Values.modelCache.quantize.bits }}
{{- $name := base .Values.config.engine.model | trimSuffix ".gguf" }}
{{- if not (get $config.engine "served_model_name") }}
{{- $_ := set $config.engine "served_model_name" $name }}
{{- end }}
{{- $_ := set $config.engine "model" (include "peregrine.quantizedModel" .) }}
{{- end }}
{{- $_ := set $config.serving "metrics" (merge (dict "host" "0.0.0.0") ($config.serving.metrics | default dict)) }}
{{- if .Values.tenants.existingSecret }}
{{- $file := printf "/etc/peregrine-tenants/%s" .Values.tenants.key }}
{{- $_ := set $config "tenants" (merge (dict "file" $file) ($config.tenants | default dict)) }}
{{- end }}
{{- toYaml $config }}
{{- end }}

{{- define "peregrine.quantizedModel" -}}
{{- $what := toJson (list .Values.config.engine.model .Values.modelCache.quantize) | sha256sum | trunc 10 -}}
/cache/quantized/{{ base .Values.config.engine.model | trimSuffix ".gguf" }}-{{ .Values.modelCache.quantize.bits }}-{{ $what }}
{{- end }}

{{/* What cannot change in a running cluster: everything but the number of replicas. */}}
{{- define "peregrine.configChecksum" -}}
{{- $config := include "peregrine.config" . | fromYaml }}
{{- $_ := set $config "cluster" (omit $config.cluster "replicas" "autoscaling") }}
{{- toJson $config | sha256sum | trunc 16 }}
{{- end }}

{{/* As `peregrine serve-config` makes it of the same file; a test holds them equal. */}}
{{- define "peregrine.serveConfig" -}}
{{- $config := include "peregrine.config" . | fromYaml }}
{{- $cluster := $config.cluster }}
{{- $replicas := dict "name" "Replica" "num_replicas" $cluster.replicas "max_surge_percent" 100 }}
{{- if not (include "peregrine.isOnGpu" .) }}
{{- $_ := set $replicas "max_replicas_per_node" 1 }}
{{- end }}
{{- with $cluster.autoscaling }}
{{- $low := .min_replicas | default 1 }}
{{- $policy := dict "min_replicas" 1 "max_replicas" 1024 }}
{{- range $key, $value := dict "target_backlog_s" 0.5 "target_busy" 0.6 "target_attainment" 0.99 "hysteresis" 0.2 }}
{{- $_ := set $policy $key (dig $key $value $cluster.autoscaling) }}
{{- end }}
{{- $scaling := dict "min_replicas" $low "initial_replicas" (min (max $cluster.replicas $low) .max_replicas) "max_replicas" .max_replicas }}
{{- $_ := set $scaling "metrics_interval_s" 1.0 }}
{{- $_ := set $scaling "look_back_period_s" (dig "look_back_s" 10.0 .) }}
{{- $_ := set $scaling "upscale_delay_s" (dig "upscale_delay_s" 5.0 .) }}
{{- $_ := set $scaling "downscale_delay_s" (dig "downscale_delay_s" 120.0 .) }}
{{- $_ := set $scaling "policy" (dict "policy_function" "serving.autoscaling_policy:PredictedLoadPolicy" "policy_kwargs" $policy) }}
{{- $_ := set $replicas "num_replicas" "auto" }}
{{- $_ := set $replicas "autoscaling_config" $scaling }}
{{- end }}
{{- $args := dict }}
{{- range $section := list "engine" "serving" "routing" "logs" "traces" "tenants" }}
{{- with get $config $section }}
{{- $_ := set $args $section . }}
{{- end }}
{{- end }}
{{- with $cluster.haproxy }}
{{- $_ := set $args "cluster" (dict "haproxy" .) }}
{{- end }}
{{- $application := dict "name" "peregrine" "route_prefix" "/" "import_path" "deploy.application:application" }}
{{- $_ := set $application "args" $args }}
{{- $deployments := list $replicas }}
{{- if include "peregrine.hasRouter" . }}
{{- $target := ternary (dig "autoscaling" "min_replicas" 1 $cluster) $cluster.replicas (not (empty $cluster.autoscaling)) }}
{{- $deployments = append $deployments (dict "name" "RequestRouter" "user_config" (dict "target_replicas" $target)) }}
{{- end }}
{{- $_ := set $application "deployments" $deployments }}
{{- $http := dict "host" "0.0.0.0" "port" $cluster.port "request_timeout_s" (addf $config.serving.request_timeout_s 3630) }}
{{- $logging := dict "log_level" "WARNING" "enable_access_log" false }}
{{- toYaml (dict "proxy_location" "EveryNode" "http_options" $http "logging_config" $logging "applications" (list $application)) }}
{{- end }}

{{- define "peregrine.hasRouter" -}}
{{- $policy := dig "policy" "auto" (.Values.config.routing | default dict) }}
{{- if and (ne $policy "none") (ne (.Values.config.cluster.haproxy | default "auto") "off") }}true{{ end }}
{{- end }}

{{/* Routers run wherever there is a proxy, beside the replica on workers and alone on the head. */}}
{{- define "peregrine.routersPerNode" -}}
{{- if include "peregrine.hasRouter" . }}{{ dig "routers_per_node" 2 (.Values.config.routing | default dict) }}{{ else }}0{{ end }}
{{- end }}

{{/* Ports on which a node's processes show their metrics: as many as there are, from the first on. */}}
{{- define "peregrine.metricsPorts" -}}
{{- $metrics := .root.Values.config.serving.metrics | default dict }}
{{- $first := dig "port" 9464 $metrics | int }}
{{- range $i := until (int .count) }}
- {name: peregrine-{{ $i }}, containerPort: {{ add $first $i }}}
{{- end }}
{{- end }}
